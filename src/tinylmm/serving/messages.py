"""Messages of a request as a conversation: system message, questions with their images and videos, answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.video_records import VIDEO_SLOT
from tinylmm.generation.inputs import placed
from tinylmm.serving.errors import wrong
from tinylmm.serving.media import Media, RemoteFile, part_of

SYSTEM = ("system", "developer")
TEXTS = ("text", "input_text", "output_text")
ALLOWED = (
    "a text, or a list of text parts and, in a user's message, image_url and video_url parts (input_text, input_image in "
    "responses)"
)
Shown = Media | RemoteFile
_SLOTS = re.compile(f"{IMAGE_SLOT}|{VIDEO_SLOT}")


@dataclass(frozen=True)
class Said:
    """One message.

    Attributes:
        text: with an image's slot for each image and video.
        images: what they hold, or where they are, in the order of the slots.
    """

    text: str
    images: tuple[Shown, ...] = ()


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
        ApiError: a message is of another form, an image or a video is neither a data URI nor an http address, or the roles
            do not alternate.
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
    """A message's text, with a slot for each image and video among its parts where the text brings none of its own."""
    content = message.get("content")
    param = f"{param}.content"
    if isinstance(content, str):
        return _checked(content, [], param) if images else Said(content)
    if not isinstance(content, list) or not content:
        raise wrong(f"{param} is {str(content)[:60]!r}; allowed: {ALLOWED}.", param)
    parts: list[str | None] = []
    files: list[Shown] = []
    for number, part in enumerate(content):
        place = f"{param}[{number}]"
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        if fields.get("type") in TEXTS and isinstance(fields.get("text"), str):
            parts.append(fields["text"])
        elif images and (shown := part_of(fields, place)) is not None:
            files.append(shown)
            parts.append(None)
        else:
            raise wrong(f"{place} is {str(part)[:60]!r}; allowed: {ALLOWED}.", place)
    if any(map(_is_video, files)):
        parts, files = _in_order(parts, files, param)
    return _checked(placed(parts), files, param) if images else Said(placed(parts))


def _is_video(shown: Shown) -> bool:
    return shown.what == "video" if isinstance(shown, RemoteFile) else not isinstance(shown, bytes)


def _in_order(parts: list[str | None], files: list[Shown], param: str) -> tuple[list[str | None], list[Shown]]:
    """The parts with `<video>` in their texts written as an image's slot, and the files in the order of such slots."""
    slots = [slot for text in parts if text is not None for slot in _SLOTS.findall(text)]
    if VIDEO_SLOT not in slots:
        return parts, files
    waiting = {True: [one for one in files if _is_video(one)], False: [one for one in files if not _is_video(one)]}
    if slots.count(VIDEO_SLOT) != len(waiting[True]) or len(slots) != len(files):
        raise wrong(
            f"{param} has {slots.count(VIDEO_SLOT)} times `{VIDEO_SLOT}` and {slots.count(IMAGE_SLOT)} times `{IMAGE_SLOT}` in "
            f"its text, but {len(waiting[True])} videos and {len(waiting[False])} images; a text that says where they stand "
            "says so once for each.",
            param,
        )
    written = [None if text is None else text.replace(VIDEO_SLOT, IMAGE_SLOT) for text in parts]
    return written, [waiting[slot == VIDEO_SLOT].pop(0) for slot in slots]


def _checked(text: str, files: list[Shown], param: str) -> Said:
    slots = text.count(IMAGE_SLOT)
    if slots != len(files):
        raise wrong(
            f"{param} has {slots} times `{IMAGE_SLOT}` in its text, and {len(files)} images; a text that says where its "
            "images stand says so once for each, in the order of the image parts.",
            param,
        )
    return Said(text, tuple(files))
