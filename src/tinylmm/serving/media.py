"""Images and videos in a request's parts: data URIs, http addresses that are fetched later, and lists of frames.

Forms are those of OpenAI's API and, for videos, of vLLM: `video_url` with a file (`data:video/mp4;base64,...`) or with JPEG
frames (`data:video/jpeg;base64,FRAME,FRAME,...`). Nothing is fetched here, and no file of this machine is read.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tinylmm.serving.errors import ApiError, wrong

IMAGES = ("image_url", "input_image")
VIDEOS = ("video_url", "input_video")
FRAMES = "video"
FILES = ("file", "input_file")
_FRAME_URI = "data:video/jpeg"
"""Not a file's type: vLLM's name for frames, each a JPEG file, divided by commas."""


@dataclass(frozen=True)
class RemoteFile:
    """An image or a video that a request names by its address; `param` is the field that does."""

    url: str
    param: str
    what: Literal["image", "video"] = "image"


@dataclass(frozen=True)
class VideoFile:
    """A video's file."""

    content: bytes


@dataclass(frozen=True)
class VideoFrames:
    """A video as its frames: encoded images, and at which second each is shown, where that is known."""

    frames: tuple[bytes, ...]
    times: tuple[float, ...] | None = None


Media = bytes | VideoFile | VideoFrames
"""What a request shows: an image's file, or a video."""


def part_of(part: Mapping[str, Any], param: str) -> Media | RemoteFile | None:
    """What a part shows; None where it is of no kind that shows something.

    Args:
        param: the field that it is.

    Raises:
        ApiError: it is of such a kind, but not as the kind is.
    """
    kind = part.get("type")
    if kind in IMAGES:
        return image_of(part.get("image_url"), f"{param}.image_url")
    if kind in VIDEOS:
        return video_of(part.get("video_url"), f"{param}.video_url")
    if kind == FRAMES and isinstance(part.get(FRAMES), list):
        return _frames_of(part, param)
    if kind == FRAMES:
        return video_of(part.get(FRAMES), f"{param}.{FRAMES}")
    if kind in FILES:
        return _file_of(part, param)
    return None


def image_of(value: Any, param: str) -> bytes | RemoteFile:
    """The file in a data URI, or an http address, given as a text or as `{"url": ...}`.

    Raises:
        ApiError: it is neither.
    """
    url = _url(value, param, "image")
    if _remote(url):
        return RemoteFile(url, param)
    return _decoded(_encoded(url, param, "image"), param, "image")


def video_of(value: Any, param: str) -> VideoFile | VideoFrames | RemoteFile:
    """The file or the frames in a data URI, or an http address, given as a text or as `{"url": ...}`.

    Raises:
        ApiError: it is none of these.
    """
    url = _url(value, param, "video")
    if _remote(url):
        return RemoteFile(url, param, "video")
    encoded = _encoded(url, param, "video")
    if url.lower().startswith(_FRAME_URI):
        return VideoFrames(tuple(_decoded(one, param, "video") for one in encoded.split(",")))
    return VideoFile(_decoded(encoded, param, "video"))


def _frames_of(part: Mapping[str, Any], param: str) -> VideoFrames:
    """`{"video": [image, ...], "times": [seconds, ...]}`."""
    given, times = part[FRAMES], part.get("times")
    frames = [image_of(value, f"{param}.{FRAMES}[{number}]") for number, value in enumerate(given)]
    files = tuple(frame for frame in frames if isinstance(frame, bytes))
    if not files or len(files) < len(frames):
        raise wrong(
            f"{param}.{FRAMES} must be data URIs of images, one at least.", f"{param}.{FRAMES}", "invalid_video"
        )
    if times is None:
        return VideoFrames(files)
    seconds = [_seconds(value) for value in times] if isinstance(times, list) else []
    if len(seconds) != len(files) or None in seconds or seconds != sorted(seconds, key=lambda value: value or 0.0):
        raise wrong(
            f"{param}.times must be seconds from 0 on, ascending, one for each of the {len(files)} frames.",
            f"{param}.times",
            "invalid_video",
        )
    return VideoFrames(files, tuple(value for value in seconds if value is not None))


def _seconds(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < math.inf else None


def _file_of(part: Mapping[str, Any], param: str) -> VideoFile | VideoFrames | RemoteFile:
    """OpenAI's files: `{"file": {"file_data": ...}}`, and in responses `{"file_data": ...}` or `{"file_url": ...}`."""
    holder = part.get("file") if part.get("type") == "file" else part
    fields = holder if isinstance(holder, Mapping) else {}
    name = "file_url" if fields.get("file_url") is not None else "file_data"
    return video_of(fields.get(name), f"{param}.{'file.' if holder is not part else ''}{name}")


def _url(value: Any, param: str, what: str) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise _invalid(f'{param} must be a data URI, or {{"url": a data URI}}.', param, what)
    return url


def _remote(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _encoded(url: str, param: str, what: Literal["image", "video"]) -> str:
    """What stands behind the head of a data URI, which must say that it is base64 of an image or a video."""
    head, comma, encoded = url.partition(",")
    words = head.lower().split(";")
    if words[0][:5] != "data:" or not comma:
        example = "data:image/png;base64,..." if what == "image" else "data:video/mp4;base64,..."
        raise _invalid(
            f"{param} is {url[:60]!r}; {what}s come as data URIs ({example}) or from http addresses that the server allows. "
            "Send the file's content.",
            param,
            what,
        )
    if words[-1].strip() != "base64" or not words[0].startswith(f"data:{what}/"):
        raise _invalid(f"{param} begins with {head[:60]!r}; it must be data:{what}/...;base64,", param, what)
    return encoded


def _decoded(encoded: str, param: str, what: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise wrong(f"{param} is no base64: {error}.", param, f"invalid_base64_{what}") from None


def _invalid(text: str, param: str, what: str) -> ApiError:
    return wrong(text, param, f"invalid_{what}_url")
