"""Videos of requests: the frames that are shown, decoded within limits of frames, pixels and seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from tinylmm.config.video import SamplingSpec
from tinylmm.data.frame_sampling import frame_indices
from tinylmm.data.images import image_size, open_image
from tinylmm.data.video import Video, see_chosen
from tinylmm.errors import UserError
from tinylmm.generation.inputs import timed_frames
from tinylmm.serving.errors import ApiError, wrong
from tinylmm.serving.media import VideoFile, VideoFrames

T = TypeVar("T")


@dataclass(frozen=True)
class VideoLimits:
    """What the videos of one request may take together.

    Attributes:
        frames: that are shown.
        pixels: of the frames that are decoded for it, and of its images.
        seconds: of reading and decoding.
    """

    frames: int
    pixels: int
    seconds: float


class FrameReader:
    """Decodes the videos of one request.

    Args:
        sampling: the frames that are shown of a file, and of frames with times; None where nothing says it.
    """

    def __init__(self, sampling: SamplingSpec | None, limits: VideoLimits) -> None:
        self.sampling, self.limits = sampling, limits
        self._frames, self._pixels = 0, 0
        self._until: float | None = None

    def read(self, video: VideoFile | VideoFrames, name: str, see: Callable[[Image.Image], T]) -> list[T]:
        """Return what `see` makes of the frames that are shown, in order.

        Raises:
            ApiError: it cannot be read, nothing says which frames to show, or it takes more than the limits.
        """
        self._until = self._until or time.monotonic() + self.limits.seconds
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video"
            try:
                if isinstance(video, VideoFrames):
                    return self._given(video, name, see)
                path.write_bytes(video.content)
                return see_chosen(path, lambda found: self._chosen(found, name), see, lambda: self._check(name))
            except UserError as error:  # which does not tell the temporary name
                raise wrong(str(error).replace(str(path), name), "messages", "invalid_video") from None

    def _chosen(self, video: Video, name: str) -> Sequence[int]:
        if self.sampling is None:
            raise wrong(
                f'{name}: the model was trained on no videos, so nothing says which frames to show. Add "media_io_kwargs": '
                '{"video": {"num_frames": 16}} to the request, or send the frames themselves.',
                "media_io_kwargs",
                "no_frames",
            )
        chosen = frame_indices(self.sampling, video.clip)
        self.take(name, len(chosen), len(set(chosen)) * video.width * video.height)
        return chosen

    def _given(self, video: VideoFrames, name: str, see: Callable[[Image.Image], T]) -> list[T]:
        times = video.times
        chosen = range(len(video.frames)) if times is None else timed_frames(times, self.sampling)
        found: dict[int, T] = {}
        self.take(name, len(chosen))
        for index in chosen:
            self._check(name)
            if index not in found:
                where = Path(f"frame {index + 1} of {name}")
                width, height = image_size(where, data=video.frames[index])
                self.take(name, 0, width * height)
                found[index] = see(open_image(where, video.frames[index], upright=True))
        return [found[index] for index in chosen]

    def take(self, name: str, frames: int, pixels: int = 0) -> None:
        """Count frames that are shown, and pixels that are decoded for it.

        Raises:
            ApiError: they are more than the limits.
        """
        self._frames += frames
        self._pixels += pixels
        if self._frames > self.limits.frames:
            what = f"up to {name}, the request's videos show {self._frames:,} frames"
            raise _too_large(what, f"{self.limits.frames:,}", "Show fewer (media_io_kwargs.video.num_frames).")
        if self._pixels > self.limits.pixels:
            what = f"up to {name}, the frames that the request shows have {self._pixels:,} pixels"
            raise _too_large(what, f"{self.limits.pixels:,}", "Scale down, or show fewer frames.")

    def _check(self, name: str) -> None:
        assert self._until is not None  # `read` has set it
        if time.monotonic() > self._until:
            what = f"{name}: to decode the request's videos takes too long"
            raise _too_large(what, f"{self.limits.seconds:g} s", "Send a shorter or smaller file, or its frames.")


def _too_large(what: str, most: str, do: str) -> ApiError:
    return wrong(f"{what}; at most {most}. {do}", "messages", "video_too_large")
