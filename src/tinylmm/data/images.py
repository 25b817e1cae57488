"""Images from untrusted data sets: safe paths, safe decoding, and a vision tower's preprocessing without torchvision.

Few formats, a pixel limit read from the header before anything is decoded, and truncated files refused: a half-decoded
image would train in silence. Every refusal is a `DataError` that names the file.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from tinylmm.config.spec import ImageSpec
from tinylmm.constants import MAX_PIXELS
from tinylmm.errors import DataError
from tinylmm.sizing.tiling import Tiling

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""GIF because OCR-VQA in LLaVA's mix has some; of an animation, the first frame counts."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, MemoryError, *_BOMBS)
"""What Pillow's readers raise on damaged files of FORMATS."""

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = ("square", "squash", "center_crop", "pad", "anyres")
SQUARE_MODES = ("squash", "center_crop")


def safe_path(root: Path, relative: str) -> Path:
    """Return the existing regular file at `root/relative`, every link followed, that lies inside `root`.

    Raises:
        DataError: the path is absolute, leads out of `root` (by `..` or a link), or names no regular file.
    """
    if not relative or "\0" in relative or Path(relative).is_absolute():
        raise DataError(f"image path {relative!r}: must be relative to {root}, and not empty. Correct the record.")
    try:
        resolved_root = root.resolve(strict=True)
        path = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"image '{relative}': not found under {root} ({getattr(error, 'strerror', None) or error}). "
            "Put the file there, or correct the record or the source's `images`."
        ) from error
    if not path.is_relative_to(resolved_root):
        raise DataError(
            f"image '{relative}': leads out of the image folder {root}, to {path}. "
            "Only files inside it are read: move the file there, or set the source's `images` to a folder around both."
        )
    if not path.is_file():
        raise DataError(f"image '{relative}': {path} is no regular file. Correct the record.")
    return path


def open_image(path: Path | BinaryIO, data: bytes | None = None) -> Image.Image:
    """Decode an image file (or the bytes of one) completely, as RGB.

    Args:
        path: a file, or an open binary one.
        data: decode this instead; `path` then only names it in messages.

    Raises:
        DataError: not one of FORMATS, more than MAX_PIXELS, damaged, or cut short.
    """
    with _open_header(path, data) as image:
        try:
            return _rgb(image)
        except DECODE_ERRORS as error:
            raise _damaged(path, error) from error


def as_rgb(image: Image.Image, what: str = "the image") -> Image.Image:
    """An image that somebody else opened, as RGB, under the same limit.

    Raises:
        DataError: it has more than MAX_PIXELS.
    """
    _check_size(what, *image.size)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Of grey values of 16 bits, the 8 upper bits are kept: Pillow's own conversion makes all above 255 white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_image(path: Path | BinaryIO) -> None:
    """Raise what `open_image` would raise, but decode JPEG at an eighth of its size (all its data is still read)."""
    with _open_header(path) as image:
        try:
            if image.format == "JPEG":
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.convert("RGB")
        except DECODE_ERRORS as error:
            raise _damaged(path, error) from error


def image_size(path: Path | BinaryIO) -> tuple[int, int]:
    """Width and height of an image file in pixels, from its header alone.

    Raises:
        DataError: not one of FORMATS, or more than MAX_PIXELS.
    """
    with _open_header(path) as image:
        return image.size


def _open_header(path: Path | BinaryIO, data: bytes | None = None) -> Image.Image:
    """Open without decoding, and refuse by format and size."""
    try:
        image = Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except _BOMBS as error:
        raise DataError(
            f"{path}: image is too large ({error}); at most {MAX_PIXELS:,} pixels. Scale it down."
        ) from error
    except DECODE_ERRORS as error:
        raise DataError(
            f"{path}: not a readable {', '.join(FORMATS)} image ({type(error).__name__}). Fetch or convert it again."
        ) from error
    try:
        _check_size(str(path), *image.size)
    except DataError:
        image.close()
        raise
    return image


def _check_size(what: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise DataError(f"{what}: image is too large ({size}); at most {MAX_PIXELS:,} pixels. Scale it down.")


def _damaged(path: Path | BinaryIO, error: BaseException) -> DataError:
    return DataError(f"{path}: image is damaged or cut short ({type(error).__name__}: {error}). Fetch it again.")


class ImageTransform:
    """RGB image -> float32 tensor (3, size, size), equal to transformers' image processors of CLIP, SigLIP and DINOv2.

    With `anyres`, as many of them as the image has tiles, (T, 3, size, size), equal to that of LLaVA-1.6 (LlavaNext).

    Args:
        size: height and width in pixels.
        mean, std: per channel, of values in 0..1.
        mode: `squash` resizes to size x size (SigLIP); `center_crop` resizes the short edge and cuts the rest (CLIP, DINOv2);
            `pad` first squares the image with the colour int(255 * mean), image centred (LLaVA's expand2square); `square`
            is whichever the argument `square` says; `anyres` gives the whole image, squashed, and tiles of it
            (`sizing/tiling.py`).
        resample: `bicubic` or `bilinear`.
        square: the tower's own mode, `squash` or `center_crop`.
        short_edge: what `center_crop` resizes the short edge to before it cuts out `size`; by default `size`.
        tiles: canvases of `anyres`, as rows and columns of tiles.

    Raises:
        ValueError: an unknown mode or filter, a size below 1, mean and std that are not three numbers each, or a short edge
            below `size`.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        mode: str,
        resample: str = "bicubic",
        square: str = "squash",
        short_edge: int | None = None,
        tiles: Sequence[Sequence[int]] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ) -> None:
        if mode not in MODES or resample not in RESAMPLE or square not in SQUARE_MODES:
            raise ValueError(
                f"mode={mode!r}, resample={resample!r}, square={square!r}; "
                f"allowed: {MODES}, {tuple(RESAMPLE)} and {SQUARE_MODES}"
            )
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0 or (short_edge or size) < size:
            raise ValueError(
                f"{size=}, {mean=}, {std=}, {short_edge=}: need a size >= 1, three numbers each with std > 0, and no "
                "short_edge below the size"
            )
        self.size = size
        self.short_edge = short_edge or size
        self.mode = square if mode == "square" else mode
        self.tiling = Tiling(size, tiles) if mode == "anyres" else None
        self.resample = RESAMPLE[resample]
        self.fill = tuple(int(value * 255) for value in mean)
        self._mean = np.array(mean, dtype=np.float32)
        self._std = np.array(std, dtype=np.float32)

    @classmethod
    def of(cls, spec: ImageSpec) -> ImageTransform:
        """The transform that a spec describes."""
        return cls(**spec.model_dump(mode="json"))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image of any size."""
        if self.tiling is not None:
            import torch  # here, as reports open images without it

            return torch.stack([self.one_view(image), *map(self._normalised, self._tiles(image, self.tiling))])
        return self.one_view(image)

    def one_view(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image to (3, size, size) in any mode; of `anyres` it is the view of the whole."""
        if self.mode == "pad":
            image = self._squared(image)
        if self.mode == "center_crop":
            resized = self._center_crop(image)
        else:
            resized = image.resize((self.size, self.size), self.resample)
        return self._normalised(resized)

    def _normalised(self, image: Image.Image) -> torch.Tensor:
        pixels = (np.asarray(image).astype(np.float64) / 255).astype(np.float32)  # (H, W, 3)
        import torch

        return torch.from_numpy(((pixels - self._mean) / self._std).transpose(2, 0, 1).copy())

    def _tiles(self, image: Image.Image, tiling: Tiling) -> list[Image.Image]:
        """The image in its canvas, cut row by row."""
        rows, columns = tiling.grid(*image.size)
        scaled = image.resize(tiling.scaled(*image.size), self.resample)
        canvas = Image.new("RGB", (columns * self.size, rows * self.size))
        canvas.paste(scaled, ((canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2))
        corners = [(column * self.size, row * self.size) for row in range(rows) for column in range(columns)]
        return [canvas.crop((left, top, left + self.size, top + self.size)) for left, top in corners]

    def _center_crop(self, image: Image.Image) -> Image.Image:
        """Resize the short edge to `short_edge`, then cut out the centre."""
        width, height = image.size
        short = min(width, height)
        new_width, new_height = int(self.short_edge * width / short), int(self.short_edge * height / short)
        left, top = (new_width - self.size) // 2, (new_height - self.size) // 2
        if new_width * new_height <= MAX_PIXELS:
            resized = image.resize((new_width, new_height), self.resample)
            return resized.crop((left, top, left + self.size, top + self.size))
        # A long strip: resize only the part that is left afterwards. The same up to rounding, but it fits into memory.
        scale_x, scale_y = width / new_width, height / new_height
        right, bottom = min(width, (left + self.size) * scale_x), min(height, (top + self.size) * scale_y)
        return image.resize((self.size, self.size), self.resample, box=(left * scale_x, top * scale_y, right, bottom))

    def _squared(self, image: Image.Image) -> Image.Image:
        side = max(image.width, image.height)
        if side * side > MAX_PIXELS:  # a long strip: shrink first, its square would not fit into memory
            image = image.copy()
            side = int(MAX_PIXELS**0.5)
            image.thumbnail((side, side), self.resample)
        if image.width == image.height:
            return image
        square = Image.new("RGB", (side, side), self.fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
