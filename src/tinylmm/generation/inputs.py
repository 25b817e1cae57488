"""What people hand to a model in Python: images and videos in any of their forms, and what was said before."""

from __future__ import annotations

import base64
import binascii
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from tinylmm.config.video import SamplingSpec
from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.frame_sampling import Clip as FrameClip
from tinylmm.data.frame_sampling import frame_indices
from tinylmm.data.images import as_rgb, open_image
from tinylmm.data.slots import question
from tinylmm.data.video import sample_frames
from tinylmm.data.video_records import VIDEO_SLOT
from tinylmm.errors import DataError, UserError


@dataclass(frozen=True)
class Clip:
    """Frames of a video that are shown, decoded."""

    frames: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Video:
    """A video among what a question comes with.

    Attributes:
        source: a file's path or content; or frames, each what `ImageInput` names, alone or as (frame, seconds from the start).
        sampling: which frames of it are shown; by default those that the model was trained with. Frames without times are
            all shown.
    """

    source: Any
    sampling: SamplingSpec | Mapping[str, Any] | None = None


ImageInput = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor | Video | Clip
"""A file's path, a file's content, an open file, a PIL image, pixels as uint8: numpy (H, W, 3) or (H, W), torch (3, H, W); or a
`Video`."""
Images = ImageInput | Sequence[ImageInput] | None

ALLOWED = (
    "a file's path, its content (bytes), an open file, a PIL image, a uint8 numpy array (H, W, 3) or (H, W), "
    "or a uint8 tensor (3, H, W)"
)
_ONE_IMAGE = (str, Path, bytes, io.IOBase, Image.Image, np.ndarray, Tensor, Video, Clip)
_SLOTS = re.compile(f"{IMAGE_SLOT}|{VIDEO_SLOT}")
VIDEO_PARTS = ("video", "video_url")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Exchange:
    """A question that was answered, with the images it came with."""

    question: str
    answer: str
    images: tuple[ImageInput, ...] = ()


History = Sequence[Exchange | tuple[str, str] | Mapping[str, Any]]


def as_list(images: Images) -> list[ImageInput]:
    """One image, several, or none, as a list."""
    if images is None:
        return []
    if isinstance(images, _ONE_IMAGE) or not isinstance(images, Sequence):
        return [images]
    return list(cast("Sequence[ImageInput]", images))


def in_order(prompt: str, image: Images, video: Any) -> tuple[str, list[ImageInput]]:
    """Return a question with its videos' slots written as images', and what it comes with in the order of its slots.

    Args:
        video: None; a video, as `Video.source` or a `Video`; or a list of `Video`s. Without `<video>` in the prompt, videos
            stand behind the images.

    Raises:
        UserError: the prompt has more or fewer `<video>` than there are videos.
    """
    several = isinstance(video, list | tuple) and len(video) > 0 and all(isinstance(one, Video) for one in video)
    more = [] if video is None else list(video) if several else [video]
    shown = [*as_list(image), *(one if isinstance(one, Video) else Video(one) for one in more)]
    slots = _SLOTS.findall(prompt)
    if VIDEO_SLOT not in slots:
        return prompt, shown
    videos = [one for one in shown if isinstance(one, Video | Clip)]
    images = [one for one in shown if not isinstance(one, Video | Clip)]
    if (slots.count(VIDEO_SLOT), len(slots)) != (len(videos), len(shown)):
        raise UserError(
            f"the prompt has {slots.count(VIDEO_SLOT)} `{VIDEO_SLOT}` and {slots.count(IMAGE_SLOT)} `{IMAGE_SLOT}`, but "
            f"{len(videos)} videos and {len(images)} images came with it. Give one for each."
        )
    waiting = {VIDEO_SLOT: iter(videos), IMAGE_SLOT: iter(images)}
    return prompt.replace(VIDEO_SLOT, IMAGE_SLOT), [next(waiting[slot]) for slot in slots]


def open_clip(video: Video, trained: SamplingSpec | None) -> Clip:
    """Decode a video's frames that are shown.

    Args:
        trained: the frames that the model was trained with.

    Raises:
        DataError: it cannot be read.
        UserError: nothing says which frames to show, or the frames or their times are of another form.
    """
    source, sampling = video.source, video.sampling or trained
    if isinstance(sampling, Mapping):
        sampling = _sampling(sampling)
    if isinstance(source, list | tuple):
        return Clip(tuple(_given_frames(source, sampling)))
    path = local_file(source, "video") if isinstance(source, str | Path) else None
    if sampling is None:
        raise UserError(
            "the model was trained on no videos, so nothing says which frames of one to show it. Show it frames as images; or "
            "say which, in Python: Video(source, sampling={'uniform': 16})."
        )
    if path is not None:
        return Clip(tuple(sample_frames(path, sampling)))
    if isinstance(source, bytes | bytearray | memoryview):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "video"
            copy.write_bytes(source)
            return Clip(tuple(_named(sample_frames, copy, sampling)))
    raise UserError(
        f"a video is given as {type(source).__name__}; allowed: a file's path or content, or a list of frames."
    )


def _named(read: Any, path: Path, sampling: SamplingSpec) -> list[Image.Image]:
    """Read a video that has no name of its own: a fault does not tell the temporary one."""
    try:
        return list(read(path, sampling))
    except DataError as error:
        raise DataError(str(error).replace(str(path), "the video")) from None


def _sampling(given: Mapping[str, Any]) -> SamplingSpec:
    try:
        return SamplingSpec.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"sampling{'.' if where else ''}{where}: {first['msg']}; got {dict(given)}.") from error


def _given_frames(source: Sequence[Any], sampling: SamplingSpec | None) -> list[Image.Image]:
    """Frames that came as images; of those with times the sampling's, as of a video of that length."""
    if not source:
        raise UserError("a video is given as an empty list of frames; give at least one.")
    timed = [isinstance(one, list | tuple) and len(one) == 2 and _is_time(one[1]) for one in source]
    if any(timed) != all(timed):
        raise UserError(
            "of a video's frames some have a time and some have none; give (frame, seconds) of all or of none."
        )
    if not all(timed):
        return [_frame(one) for one in source]
    times = [float(one[1]) for one in source]
    if times != sorted(times) or times[0] < 0:
        raise UserError(f"a video's frames must come in the order of their times, from 0 on; got {times[:5]}.")
    return [_frame(source[index][0]) for index in timed_frames(times, sampling)]


def timed_frames(times: Sequence[float], sampling: SamplingSpec | None) -> list[int]:
    """Numbers of the frames that a sampling chooses of those shown at ascending times; all of them without one."""
    if sampling is None:
        return list(range(len(times)))
    span = times[-1] - times[0]
    seconds = span * len(times) / (len(times) - 1) if span else 1.0
    return frame_indices(sampling, FrameClip(len(times), len(times) / seconds, seconds))


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _frame(image: Any) -> Image.Image:
    frame = decode(image)
    if isinstance(frame, Clip):
        raise UserError("a frame of a video is given as a video; give images.")
    return frame


def decode(image: ImageInput, trained: SamplingSpec | None = None) -> Image.Image | Clip:
    """Decode an image completely, as RGB; one that is still encoded is turned as its camera says. Of a video, its frames.

    Args:
        trained: the frames of videos that the model was trained with.

    Raises:
        DataError: there is no such file, or it is no image that can be read.
        UserError: it is of another type or shape than `ImageInput` names.
    """
    if isinstance(image, Clip):
        return image
    if isinstance(image, Video):
        return open_clip(image, trained)
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return open_image(Path("the image's bytes"), bytes(image), upright=True)
    if isinstance(image, np.ndarray | Tensor):
        return _from_pixels(image)
    if isinstance(image, str | Path):
        return _from_file(str(image))
    if hasattr(image, "read"):
        return open_image(Path("the open image file"), image.read(), upright=True)
    raise UserError(f"an image is given as {type(image).__name__}; allowed: {ALLOWED}.")


def _from_file(name: str) -> Image.Image:
    if name.startswith("data:"):
        head, _, encoded = name.partition(",")
        try:
            return open_image(Path(head), base64.b64decode(encoded, validate=True), upright=True)
        except binascii.Error as error:
            raise DataError(f"the image {name[:40]!r} is a data URL that is no base64 ({error}).") from error
    return open_image(local_file(name, "image"), upright=True)


def local_file(name: str | Path, what: str) -> Path:
    """The file of an image or a video.

    Raises:
        DataError: there is none.
    """
    try:
        found = Path(name).is_file()
    except ValueError:  # a zero byte
        found = False
    if not found:
        raise DataError(f"{name}: no such {what} file. Give the path of a local file; nothing is downloaded.")
    return Path(name)


def _from_pixels(pixels: np.ndarray | Tensor) -> Image.Image:
    """Pixels as cameras, video readers and data sets give them."""
    kind = "tensor" if isinstance(pixels, Tensor) else "numpy array"
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else pixels
    if isinstance(pixels, Tensor) and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)) or not array.size:
        raise UserError(
            f"an image is given as {kind} of shape {tuple(pixels.shape)} and type {pixels.dtype}; allowed: {ALLOWED}. "
            "Values from 0 to 1 must be scaled to 0 to 255 first."
        )
    return as_rgb(Image.fromarray(np.ascontiguousarray(array)))


def conversation(history: History) -> tuple[str | None, list[Exchange]]:
    """Return a conversation's system message, None if it brings none, and its exchanges.

    Args:
        history: oldest first: `Exchange`s or (question, answer) pairs; or OpenAI's messages, dicts of "role" (system, user,
            assistant) and "content": text, or a list of parts ("text", "image", "image_url").

    Raises:
        UserError: it is none of these, or its roles do not alternate.
    """
    items = list(history)
    if items and all(isinstance(item, Mapping) for item in items):
        return _from_messages(cast("list[Mapping[str, Any]]", items))
    return None, [_exchange(number, item) for number, item in enumerate(items)]


def _exchange(number: int, item: Any) -> Exchange:
    if isinstance(item, Exchange):
        return item
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return Exchange(*item)
    raise UserError(
        f"history[{number}] is {str(item)[:60]!r}; allowed: Exchange(question, answer, images), (question, answer), or all "
        'of them messages {"role": ..., "content": ...}.'
    )


def _from_messages(messages: list[Mapping[str, Any]]) -> tuple[str | None, list[Exchange]]:
    read = [_message(number, message) for number, message in enumerate(messages)]
    system = None
    if read and read[0][0] == "system":
        system, read = read[0][1], read[1:]
    roles = [role for role, *_ in read]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"history has the roles {', '.join(roles) or 'system alone'}; they must be user and assistant in turn, ending "
            "with the assistant's answer, behind at most one system message. The new question is `prompt`."
        )
    pairs = zip(read[::2], read[1::2], strict=True)
    return system, [Exchange(asked, answer, tuple(images)) for (_, asked, images), (_, answer, _) in pairs]


def _message(number: int, message: Mapping[str, Any]) -> tuple[str, str, list[ImageInput]]:
    """Role, text with a slot for each image among its parts, and the images."""
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise UserError(f"history[{number}] has the role {role!r}; allowed: {', '.join(_ROLES)}.")
    if isinstance(content, str):
        return role, content, []
    parts: list[str | None] = []
    images = []
    for part in content if isinstance(content, list) else [content]:
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        kind = fields.get("type")
        if kind == "text" and isinstance(fields.get("text"), str):
            parts.append(fields["text"])
        elif kind in ("image", "image_url") and role == "user" and (image := _image_of(fields)) is not None:
            parts.append(None)
            images.append(image)
        elif kind in VIDEO_PARTS and role == "user" and (video := _image_of(fields)) is not None:
            parts.append(None)
            images.append(Video(video))
        else:
            raise UserError(
                f"history[{number}] has the content {str(part)[:60]!r}; allowed: a text, or a list of parts of type text "
                "and, in a user's message, image, image_url, video or video_url."
            )
    return role, placed(parts), images


def placed(parts: Sequence[str | None]) -> str:
    """Text of a message's parts, None for an image: with a slot for each image, unless the texts bring slots of their own.

    Images in front of all texts stand as `question` puts those that come with a text.
    """
    texts = [part for part in parts if part is not None]
    images = len(parts) - len(texts)
    if not images or any(IMAGE_SLOT in text for text in texts):
        return "\n".join(texts)
    if all(part is None for part in parts[:images]):
        return question("\n".join(texts), images).user
    return "\n".join(IMAGE_SLOT if part is None else part.strip() for part in parts)


def _image_of(part: Mapping[str, Any]) -> Any:
    """What an image or video part holds: under its kind (OpenAI: a dict with `url`), `url` or `path`."""
    keys = ("image", "image_url", *VIDEO_PARTS, "url", "path")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, Mapping) else value
