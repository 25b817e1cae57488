"""Images from untrusted data sets: safe paths, safe decoding, and a vision tower's preprocessing without torchvision.

Few formats, a pixel limit read from the header before anything is decoded, and truncated files refused: a half-decoded
image would train in silence. Every refusal is a `DataError` that names the file.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinylmm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""GIF because OCR-VQA in LLaVA's mix has some; of an animation, the first frame counts."""
MAX_PIXELS = 50_000_000

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, MemoryError, *_BOMBS)
"""What Pillow's readers raise on damaged files of FORMATS."""

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = ("squash", "center_crop", "pad")


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


def open_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Decode an image file completely, as RGB; with `data`, decode that, and `path` only names it in messages.

    Raises:
        DataError: not one of FORMATS, more than MAX_PIXELS, damaged, or cut short.
    """
    with _open_header(path, data) as image:
        try:
            return image.convert("RGB")
        except _DECODE_ERRORS as error:
            raise _damaged(path, error) from error


def check_image(path: Path) -> None:
    """Raise what `open_image` would raise, but decode JPEG at an eighth of its size (all its data is still read)."""
    with _open_header(path) as image:
        try:
            if image.format == "JPEG":
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.convert("RGB")
        except _DECODE_ERRORS as error:
            raise _damaged(path, error) from error


def _open_header(path: Path, data: bytes | None = None) -> Image.Image:
    """Open without decoding, and refuse by format and size."""
    try:
        image = Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except _BOMBS as error:
        raise DataError(
            f"{path}: image is too large ({error}); at most {MAX_PIXELS:,} pixels. Scale it down."
        ) from error
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{path}: not a readable {', '.join(FORMATS)} image ({type(error).__name__}). Fetch or convert it again."
        ) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
        image.close()
        raise DataError(f"{path}: image is too large ({size}); at most {MAX_PIXELS:,} pixels. Scale it down.")
    return image


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: image is damaged or cut short ({type(error).__name__}: {error}). Fetch it again.")


class ImageTransform:
    """RGB image -> float32 tensor (3, size, size), equal to transformers' CLIP and SigLIP image processors.

    Args:
        size: height and width in pixels.
        mean, std: per channel, of values in 0..1.
        mode: `squash` resizes to size x size (SigLIP); `center_crop` resizes the short edge and cuts the rest (CLIP);
            `pad` first squares the image with the colour int(255 * mean), image centred (LLaVA's expand2square).
        resample: `bicubic` or `bilinear`.

    Raises:
        ValueError: an unknown mode or filter, a size below 1, or mean and std that are not three numbers each.
    """

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], mode: str, resample: str = "bicubic"
    ) -> None:
        if mode not in MODES or resample not in RESAMPLE:
            raise ValueError(f"mode={mode!r}, resample={resample!r}; allowed: {MODES} and {tuple(RESAMPLE)}")
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"size={size}, mean={mean}, std={std}: need a size >= 1 and three numbers each, std > 0")
        self.size = size
        self.mode = mode
        self.resample = RESAMPLE[resample]
        self.fill = tuple(int(value * 255) for value in mean)
        self._mean = np.array(mean, dtype=np.float32)
        self._std = np.array(std, dtype=np.float32)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image of any size."""
        if self.mode == "pad":
            image = self._squared(image)
        if self.mode == "center_crop":
            resized = self._center_crop(image)
        else:
            resized = image.resize((self.size, self.size), self.resample)
        pixels = (np.asarray(resized).astype(np.float64) / 255).astype(np.float32)  # (H, W, 3)
        return torch.from_numpy(((pixels - self._mean) / self._std).transpose(2, 0, 1).copy())

    def _center_crop(self, image: Image.Image) -> Image.Image:
        """Resize the short edge to `size`, then cut out the centre."""
        width, height = image.size
        short = min(width, height)
        new_width, new_height = int(self.size * width / short), int(self.size * height / short)
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
