"""Images of requests: decoded and prepared once, however often they are sent."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tinylmm.data.images import ImageTransform, image_size, open_image
from tinylmm.errors import DataError
from tinylmm.serving.errors import wrong


@dataclass(frozen=True)
class Prepared:
    """An image as the tower takes it, (3, H, W) or in tiles (T, 3, H, W), and its width and height in pixels."""

    pixels: Tensor
    size: tuple[int, int]


class ImageShelf:
    """Prepares images, and keeps those used last. Any thread may call it.

    Args:
        keep: how many stay.
        max_pixels: of the images of one request together.
    """

    def __init__(self, transform: ImageTransform, keep: int, max_pixels: int) -> None:
        self.transform, self.keep, self.max_pixels = transform, keep, max_pixels
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Prepared] = OrderedDict()

    def prepare(self, files: Sequence[bytes]) -> dict[str, Prepared]:
        """Return a request's images by key, in their order; equal ones have one key.

        Raises:
            ApiError: one cannot be read, or they are too large.
        """
        found: dict[str, Prepared] = {}
        for number, file in enumerate(files):
            key = key_of(file)
            found[key] = self._one(key, file, f"image {number + 1} of the request")
            pixels = sum(width * height for width, height in (image.size for image in found.values()))
            if pixels > self.max_pixels:
                raise _too_large(f"the request's first {number + 1} images have {pixels:,} pixels", self.max_pixels)
        return found

    def _one(self, key: str, file: bytes, name: str) -> Prepared:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            width, height = image_size(Path(name), data=file)
            if width * height > self.max_pixels:
                raise _too_large(f"{name} has {width} x {height} = {width * height:,} pixels", self.max_pixels)
            image = open_image(Path(name), file, upright=True)
        except DataError as error:
            raise wrong(str(error), "messages", "invalid_image") from None
        prepared = Prepared(self.transform(image), image.size)
        with self._lock:
            self._kept[key] = prepared
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return prepared


def key_of(file: bytes) -> str:
    """What an image is known by: equal files are one image."""
    return hashlib.sha256(file).hexdigest()


def _too_large(what: str, most: int) -> Exception:
    return wrong(f"{what}; at most {most:,}. Scale down.", "messages", "image_too_large")
