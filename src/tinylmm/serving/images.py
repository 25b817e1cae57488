"""Images and videos of requests: decoded and prepared once, however often they are sent."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinylmm.config.video import SamplingSpec
from tinylmm.constants import Extent
from tinylmm.data.images import image_size, open_image
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import DataError
from tinylmm.serving.errors import wrong
from tinylmm.serving.media import Media, VideoFile, VideoFrames
from tinylmm.serving.videos import FrameReader, VideoLimits


@dataclass(frozen=True)
class Prepared:
    """An image as the tower takes it, (3, H, W) or in tiles (T, 3, H, W), and its width and height in pixels.

    Of a video the frames that are shown, (T, 3, H, W), and (0, 0, T).
    """

    pixels: Tensor
    size: Extent


class ImageShelf:
    """Prepares images and videos, and keeps those used last. Any thread may call it.

    Args:
        keep: how many stay.
        max_pixels: of the images of one request together.
        videos: what the videos of one request may take together.
    """

    def __init__(self, transform: ImageTransform, keep: int, max_pixels: int, videos: VideoLimits) -> None:
        self.transform, self.keep, self.max_pixels, self.videos = transform, keep, max_pixels, videos
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Prepared] = OrderedDict()

    def prepare(self, shown: Sequence[Media], sampling: SamplingSpec | None = None) -> dict[str, Prepared]:
        """Return a request's images and videos by key, in their order; equal ones have one key.

        Args:
            sampling: which frames of videos are shown.

        Raises:
            ApiError: one cannot be read, or they are too large.
        """
        found: dict[str, Prepared] = {}
        reader = FrameReader(sampling, self.videos)
        for number, one in enumerate(shown, 1):
            key = key_of(one, sampling)
            if isinstance(one, bytes):
                found[key] = self._image(key, one, f"image {number} of the request")
            else:
                found[key] = self._video(key, one, f"video {number} of the request", reader)
            pixels = sum(width * height for width, height, *_ in (image.size for image in found.values()))
            if pixels > self.max_pixels:
                raise _too_large(f"the request's first {number} images have {pixels:,} pixels", self.max_pixels)
        return found

    def _image(self, key: str, file: bytes, name: str) -> Prepared:
        if (known := self._known(key)) is not None:
            return known
        try:
            width, height = image_size(Path(name), data=file)
            if width * height > self.max_pixels:
                raise _too_large(f"{name} has {width} x {height} = {width * height:,} pixels", self.max_pixels)
            image = open_image(Path(name), file, upright=True)
        except DataError as error:
            raise wrong(str(error), "messages", "invalid_image") from None
        return self._keep(key, Prepared(self.transform(image), image.size))

    def _video(self, key: str, video: VideoFile | VideoFrames, name: str, reader: FrameReader) -> Prepared:
        if (known := self._known(key)) is not None:
            reader.take(name, len(known.pixels))
            return known
        frames = torch.stack(reader.read(video, name, self.transform.one_view))
        return self._keep(key, Prepared(frames, (0, 0, len(frames))))

    def _known(self, key: str) -> Prepared | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: str, prepared: Prepared) -> Prepared:
        with self._lock:
            self._kept[key] = prepared
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return prepared


def key_of(shown: Media, sampling: SamplingSpec | None = None) -> str:
    """What an image or a video is known by: equal files, of which the same frames are shown, are one."""
    if isinstance(shown, bytes):
        return hashlib.sha256(shown).hexdigest()
    files = [shown.content] if isinstance(shown, VideoFile) else shown.frames
    times = None if isinstance(shown, VideoFile) else shown.times
    how = None if sampling is None else sampling.given()
    said = [type(shown).__name__, how, times, [hashlib.sha256(file).hexdigest() for file in files]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _too_large(what: str, most: int) -> Exception:
    return wrong(f"{what}; at most {most:,}. Scale down.", "messages", "image_too_large")
