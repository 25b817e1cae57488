"""Records with videos, told in the words of records with images: one list of both in the order of their slots.

A record names its videos in `video` or `videos`, and `<video>` in a question is the slot of one. Where no question has it,
`<image>` is, as in TinyLLaVA-Video's files; a record with images too must say which slot is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.formats import USER_ROLES, RecordFaultError

VIDEO_SLOT = "<video>"
_SLOTS = re.compile(f"{IMAGE_SLOT}|{VIDEO_SLOT}")


def videos_as_images(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose `images` are its images and videos, a video as {"video": what names it}; others as they are.

    Raises:
        RecordFaultError: it has more or fewer slots than images and videos, or does not say which slot is which.
    """
    videos = _named(record, "video")
    if not videos:
        return record
    images, questions = _named(record, "image"), list(_questions(record))
    found = [slot for text in questions for slot in _SLOTS.findall(text)]
    if images and VIDEO_SLOT not in found and found:
        raise RecordFaultError(
            f"the record has images and videos, but no {VIDEO_SLOT} in its questions says where a video is"
        )
    kinds = found if VIDEO_SLOT in found or images else [VIDEO_SLOT] * len(found)
    for slot, named in ((VIDEO_SLOT, videos), (IMAGE_SLOT, images)):
        if found and kinds.count(slot) != len(named):
            what = "videos" if slot == VIDEO_SLOT else "images"
            raise RecordFaultError(
                f"its questions have {kinds.count(slot)} slots for {what} but the record names {len(named)} {what}"
            )
    marked = iter([{"video": video} for video in videos])
    others = iter(images)
    ordered = [next(marked if slot == VIDEO_SLOT else others) for slot in kinds] or [*others, *marked]
    return {**_in_image_slots(record), "image": None, "images": ordered, "video": None, "videos": None}


def _named(record: dict[str, Any], key: str) -> list[Any]:
    keys = [name for name in (key, f"{key}s") if record.get(name) is not None]
    if len(keys) > 1:
        raise RecordFaultError(f"the record has both `{key}` and `{key}s`; keep one")
    named = record[keys[0]] if keys else []
    return list(named) if isinstance(named, list) else [named]


def _questions(record: dict[str, Any]) -> Iterator[str]:
    for key, role, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        messages = record.get(key)
        for message in messages if isinstance(messages, list) else ():
            if _asks(message, role, content):
                yield message[content]


def _in_image_slots(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the slots of videos written as those of images."""
    told = dict(record)
    for key, role, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        messages = record.get(key)
        if isinstance(messages, list):
            told[key] = [
                {**message, content: message[content].replace(VIDEO_SLOT, IMAGE_SLOT)}
                if _asks(message, role, content)
                else message
                for message in messages
            ]
    return told


def _asks(message: Any, role: str, content: str) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get(role), str)
        and message[role] in USER_ROLES
        and isinstance(message.get(content), str)
    )
