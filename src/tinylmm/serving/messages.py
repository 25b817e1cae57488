"""Messages of a request as a conversation: system message, questions with their images, answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinylmm.constants import IMAGE_SLOT
from tinylmm.generation.inputs import placed
from tinylmm.serving.errors import wrong

SYSTEM = ("system", "developer")
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
ALLOWED = (
    "a text, or a list of text parts and, in a user's message, image_url parts (input_text, input_image in responses)"
)


@dataclass(frozen=True)
class RemoteImage:
    """An image that a request names by its address; `param` is the field that does."""

    url: str
    param: str


@dataclass(frozen=True)
class Said:
    """One message.

    Attributes:
        text: with a slot for each image.
        images: their files' contents, or where they are, in the order of the slots.
    """

    text: str
    images: tuple[bytes | RemoteImage, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What was said before a question, and the question, which is the last of `questions`."""

    system: str | None
    questions: tuple[Said, ...]
    answers: tuple[str, ...]


def read_messages(messages: Sequence[Mapping[str, Any]], name: str = "messages") -> Conversation:
    """Read a request's messages.

    Args:
        name: the field they are in.

    Raises:
        ApiError: a message is of another form, an image is neither a data URI nor an http address, or the roles do not
            alternate.
    """
    system: list[str] = []
    turns: list[tuple[str, Said]] = []
    for number, message in enumerate(messages):
        param = f"{name}[{number}]"
        role = message.get("role")
        if role in SYSTEM and not turns:
            system.append(_content(message, param, images=False).text)
            continue
        wanted = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role != wanted:
            after = f"behind the {turns[-1][0]}'s" if turns else "first"
            raise wrong(
                f"{param} has the role {str(role)[:40]!r}; {after} comes {wanted}. Messages are: system (or developer), then "
                "user and assistant in turn, ending with user; tools are not supported.",
                f"{param}.role",
            )
        turns.append((wanted, _content(message, param, images=wanted == "user")))
    if not turns or turns[-1][0] != "user":
        raise wrong(f"{name} must end with a user's message, the question to answer.", name)
    questions, answers = [said for _, said in turns[::2]], [said.text for _, said in turns[1::2]]
    return Conversation("\n".join(system) if system else None, tuple(questions), tuple(answers))


def _content(message: Mapping[str, Any], param: str, images: bool) -> Said:
    """A message's text, with a slot for each image among its parts where the text brings none of its own."""
    content = message.get("content")
    param = f"{param}.content"
    if isinstance(content, str):
        return _checked(content, [], param) if images else Said(content)
    if not isinstance(content, list) or not content:
        raise wrong(f"{param} is {str(content)[:60]!r}; allowed: {ALLOWED}.", param)
    parts: list[str | None] = []
    files: list[bytes | RemoteImage] = []
    for number, part in enumerate(content):
        place = f"{param}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXTS and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in IMAGES and images:
            files.append(image_of(part.get("image_url"), f"{place}.image_url"))
            parts.append(None)
        else:
            raise wrong(f"{place} is {str(part)[:60]!r}; allowed: {ALLOWED}.", place)
    return _checked(placed(parts), files, param) if images else Said(placed(parts))


def _checked(text: str, files: list[bytes | RemoteImage], param: str) -> Said:
    slots = text.count(IMAGE_SLOT)
    if slots != len(files):
        raise wrong(
            f"{param} has {slots} times `{IMAGE_SLOT}` in its text, and {len(files)} images; a text that says where its "
            "images stand says so once for each, in the order of the image parts.",
            param,
        )
    return Said(text, tuple(files))


def image_of(value: Any, param: str) -> bytes | RemoteImage:
    """The file in a data URI, or an http address, given as a text or as `{"url": ...}`.

    Raises:
        ApiError: it is neither. Nothing is fetched here, and no file of this machine is read.
    """
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise wrong(f'{param} must be a data URI, or {{"url": a data URI}}.', param, "invalid_image_url")
    if url.lower().startswith(("http://", "https://")):
        return RemoteImage(url, param)
    head, comma, encoded = url.partition(",")
    words = head.lower().split(";")
    if words[0][:5] != "data:" or not comma:
        raise wrong(
            f"{param} is {url[:60]!r}; images come as data URIs (data:image/png;base64,...) or from http addresses that the "
            "server allows. Send the file's content.",
            param,
            "invalid_image_url",
        )
    if words[-1].strip() != "base64" or not words[0].startswith("data:image/"):
        raise wrong(f"{param} begins with {head[:60]!r}; it must be data:image/...;base64,", param, "invalid_image_url")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise wrong(f"{param} is no base64: {error}.", param, "invalid_base64_image") from None
