"""A vision tower's preprocessing without torchvision: what it makes of an image is bytes, and normalising them a table look-up.

So the two halves can be taken apart: the bytes (`views`) cost the time and can be kept (`store/pixels.py`), the numbers
(`normalise`) have four times their size and come from them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tinylmm.config.spec import ImageSpec
from tinylmm.constants import MAX_PIXELS
from tinylmm.sizing.tiling import Tiling

if TYPE_CHECKING:
    import torch

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = ("square", "squash", "center_crop", "pad", "anyres")
SQUARE_MODES = ("squash", "center_crop")


def _normalised_values(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(3, 256) float32: what becomes of each value of each channel, to the last bit as transformers computes it for pixels."""
    scaled = (np.arange(256) / 255).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


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
        self._values = _normalised_values(mean, std)

    @classmethod
    def of(cls, spec: ImageSpec) -> ImageTransform:
        """The transform that a spec describes."""
        return cls(**spec.model_dump(mode="json"))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image of any size."""
        return self.normalise(self.views(image))

    def one_view(self, image: Image.Image) -> torch.Tensor:
        """Transform one RGB image to (3, size, size) in any mode; of `anyres` it is the view of the whole."""
        return self.normalise(self.whole(image))

    def views(self, image: Image.Image) -> np.ndarray:
        """Bytes of one RGB image of any size before they are normalised: (3, size, size) uint8, or (T, 3, size, size)."""
        if self.tiling is None:
            return self.whole(image)
        return np.stack([self.whole(image), *map(_planes, self._tiles(image, self.tiling))])

    def whole(self, image: Image.Image) -> np.ndarray:
        """Bytes of one RGB image before they are normalised, (3, size, size) uint8 in any mode."""
        if self.mode == "pad":
            image = self._squared(image)
        if self.mode == "center_crop":
            return _planes(self._center_crop(image))
        return _planes(image.resize((self.size, self.size), self.resample))

    def normalise(self, views: np.ndarray) -> torch.Tensor:
        """Bytes (..., 3, H, W) as float32 numbers of the same shape."""
        import torch  # here, as reports open images without it

        numbers = np.empty(views.shape, np.float32)
        planes = zip(views.reshape(-1, *views.shape[-2:]), numbers.reshape(-1, *views.shape[-2:]), strict=True)
        for number, (plane, out) in enumerate(planes):  # one by one, as each lies in one piece
            np.take(self._values[number % 3], plane, out=out, mode="clip")
        return torch.from_numpy(numbers)

    @property
    def geometry(self) -> dict[str, Any]:
        """All that decides the bytes of `views`: transforms that share it differ in normalising alone."""
        found = {"size": self.size, "mode": self.mode, "resample": self.resample.name.lower()}
        own: dict[str, dict[str, Any]] = {
            "pad": {"fill": list(self.fill)},
            "center_crop": {"short_edge": self.short_edge},
            "anyres": {"tiles": [list(grid) for grid in self.tiling.grids] if self.tiling else []},
        }
        return found | own.get(self.mode, {})

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


def _planes(image: Image.Image) -> np.ndarray:
    """(3, H, W) uint8 of an RGB image."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
