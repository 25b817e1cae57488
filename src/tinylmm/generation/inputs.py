"""What people hand to a model in Python: images in any of their forms, and what was said before."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from torch import Tensor

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.images import as_rgb, open_image
from tinylmm.data.slots import question
from tinylmm.errors import DataError, UserError

ImageInput = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
"""A file's path, a file's content, an open file, a PIL image, pixels as uint8: numpy (H, W, 3) or (H, W), torch (3, H, W)."""
Images = ImageInput | Sequence[ImageInput] | None

ALLOWED = (
    "a file's path, its content (bytes), an open file, a PIL image, a uint8 numpy array (H, W, 3) or (H, W), "
    "or a uint8 tensor (3, H, W)"
)
_ONE_IMAGE = (str, Path, bytes, io.IOBase, Image.Image, np.ndarray, Tensor)
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


def decode(image: ImageInput) -> Image.Image:
    """Decode an image completely, as RGB; one that is still encoded is turned as its camera says.

    Raises:
        DataError: there is no such file, or it is no image that can be read.
        UserError: it is of another type or shape than `ImageInput` names.
    """
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
    try:
        found = Path(name).is_file()
    except ValueError:  # a zero byte
        found = False
    if not found:
        raise DataError(f"{name}: no such image file. Give the path of a local file; nothing is downloaded.")
    return open_image(Path(name), upright=True)


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
        else:
            raise UserError(
                f"history[{number}] has the content {str(part)[:60]!r}; allowed: a text, or a list of parts of type text "
                "and, in a user's message, image or image_url."
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
    """What an image part holds: under `image`, `image_url` (OpenAI: a dict with `url`), `url` or `path`."""
    value = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, Mapping) else value
