"""Records of different data formats as one conversation: LLaVA, ShareGPT and OpenAI messages.

LLaVA      {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}: strictly alternating, `<image>` is a slot.
ShareGPT   the same with a system message (a first turn `from: system`, or the key `system`) and `image` or `images`.
OpenAI     {"messages": [{"role", "content": text | [{"type": "text", "text"}, {"type": "image_url", "image_url"}, ...]}]}.
           Images stand in the list of parts, or as `<image>` in texts where the record has `image` or `images`. A part
           {"type": "video_url", "video_url": ...} is a video; other records name theirs as `data/video_records.py` says.
Cauldron   {"images": [...], "texts": [{"user", "assistant", "source"}]}: all images stand in front of the first question.

A conversation of LLaVA or ShareGPT may begin with an answer, which is left out, as in LLaVA's own code. An empty answer is
one: what is learnt from it is to end at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.segments import Turn

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant")
SYSTEM_ROLES = ("system", "developer")
_IMAGE_PARTS = ("image_url", "image", "input_image")
_VIDEO_PARTS = ("video_url", "video", "input_video")
_TEXT_PARTS = ("text", "input_text")
_QWEN_IMAGE = re.compile(r"<img>[^<>\n]+\.(?:jpe?g|png|webp|gif|bmp)</img>", re.IGNORECASE)
"""How Qwen-VL's own data names a picture: inside the question."""
_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


class RecordFaultError(Exception):
    """Carries a reason from wherever it is found to `sample.parse_record`."""


@dataclass(frozen=True)
class Conversation:
    """What a record says: complete turns, images in slot order as the record names them, its own system message.

    `greeted`: it began with an answer, which is left out.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]
    system: str | None = None
    greeted: bool = False


def kind(value: Any) -> str:
    """What a wrong value is, in words."""
    return "missing" if value is None else f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """A wrong value itself, in short whatever it is."""
    return _BRIEF.repr(value)


def is_broken(text: str) -> bool:
    """Whether a text holds half a character (a lone surrogate), which no file can be written with."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def parse_llava(record: dict[str, Any]) -> Conversation:
    """Read a LLaVA record. Anything but alternating human and gpt is a fault."""
    messages = [
        _fields(number, message, "from", "value") for number, message in enumerate(_list(record, "conversations"))
    ]
    texts = []
    first = int(_is_greeting(messages))
    for number, (role, text) in enumerate(messages[first:], first):
        answer = (number - first) % 2 == 1
        if role not in USER_ROLES + ASSISTANT_ROLES:
            hint = ", or set the source's format to sharegpt" if role in SYSTEM_ROLES else ""
            raise RecordFaultError(
                f"message {number} is from unknown role {shown(role)}; allowed: {USER_ROLES + ASSISTANT_ROLES}{hint}"
            )
        _in_turn(number, role, answer)
        texts.append(_checked_text(number, text))
    if len(texts) % 2:
        raise _unanswered(messages)
    turns = tuple(Turn(user, answer) for user, answer in zip(texts[::2], texts[1::2], strict=True))
    return _in_words(Conversation(turns, _named_images(record), greeted=bool(first)))


def parse_sharegpt(record: dict[str, Any]) -> Conversation:
    """Read a ShareGPT record."""
    messages = [
        _fields(number, message, "from", "value") for number, message in enumerate(_list(record, "conversations"))
    ]
    return _conversation(messages, record, slots_in_text=True, greets=True)


def parse_openai(record: dict[str, Any]) -> Conversation:
    """Read a record of OpenAI messages. In a list of parts, and without named images, `<image>` in a text is text."""
    messages = [_fields(number, message, "role", "content") for number, message in enumerate(_list(record, "messages"))]
    return _conversation(messages, record, slots_in_text=bool(_named_images(record)), greets=False)


def parse_cauldron(record: dict[str, Any]) -> Conversation:
    """Read a record of the_cauldron, as nanoVLM does."""
    images = _named_images(record)
    turns: list[Turn] = []
    for number, text in enumerate(_list(record, "texts")):
        asked, answer = _fields(number, text, "user", "assistant")
        texts = ("",) * (0 if turns else len(images)) + (_checked_text(number, asked),)
        user = f"{IMAGE_SLOT}\n" * (len(texts) - 1) + texts[-1]
        around = (*texts[:1], *("\n",) * (len(texts) - 2), f"\n{texts[-1]}") if len(texts) > 1 else texts
        turns.append(Turn(user, _checked_text(number, answer), around if IMAGE_SLOT in texts[-1] else None))
    return Conversation(tuple(turns), images)


def parse_any(record: dict[str, Any]) -> Conversation:
    """Read a record by its key: `messages` (OpenAI), `conversations` (ShareGPT, LLaVA) or `texts` (the_cauldron)."""
    if record.get("messages") is not None:
        return parse_openai(record)
    if record.get("conversations") is not None:
        return parse_sharegpt(record)
    if record.get("texts") is not None:
        return parse_cauldron(record)
    keys = ", ".join(map(str, record)) or "nothing"
    raise RecordFaultError(
        "the record has neither `conversations` (LLaVA, ShareGPT) nor `messages` (OpenAI) nor `texts` (the_cauldron), "
        f"but {keys}"
    )


PARSERS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "llava": parse_llava,
    "sharegpt": parse_sharegpt,
    "openai": parse_openai,
    "parquet": parse_any,
    "auto": parse_any,
}
"""The source's `format` -> parser of one record."""


def _conversation(
    messages: Sequence[tuple[Any, Any]], record: dict[str, Any], slots_in_text: bool, greets: bool
) -> Conversation:
    """`greets`: the conversation may begin with an answer."""
    system = record.get("system") or None
    first = 0
    if messages[0][0] in SYSTEM_ROLES:
        if system is not None:
            raise RecordFaultError("the record has a key `system` and a system message; keep one")
        system, first = _plain_text(0, messages[0][1]), 1
    greeted = greets and _is_greeting(messages[first:])
    first += greeted
    if system is not None:
        system = _checked_text(0, system)
    named = list(_named_images(record))
    images: list[Any] = []
    turns: list[Turn] = []
    asked: Turn | None = None
    for number, (role, content) in enumerate(messages[first:], first):
        if role not in USER_ROLES + ASSISTANT_ROLES:
            where = " (a system message may only be the first)" if role in SYSTEM_ROLES else ""
            allowed = (*USER_ROLES, *ASSISTANT_ROLES, "system")
            raise RecordFaultError(f"message {number} is from unknown role {shown(role)}; allowed: {allowed}{where}")
        _in_turn(number, role, asked is not None)
        if asked is None:
            asked, found = _question(number, content, slots_in_text)
            images += [named.pop(0) if image is None and named else image for image in found]
        else:
            answer = _checked_text(number, _plain_text(number, content))
            turns.append(Turn(asked.user, answer, asked.around))
            asked = None
    if asked is not None:
        raise _unanswered(messages)
    if not turns:
        raise RecordFaultError("there is no question behind the first message")
    slots = len(images)
    if named or None in images:
        count = slots - images.count(None) + len(named)
        raise RecordFaultError(f"its questions have {slots} {IMAGE_SLOT} but the record names {count} images")
    return _in_words(Conversation(tuple(turns), tuple(images), system, greeted))


def _is_greeting(messages: Sequence[tuple[Any, Any]]) -> bool:
    return bool(messages) and messages[0][0] in ASSISTANT_ROLES


def _unanswered(messages: Sequence[Any]) -> RecordFaultError:
    return RecordFaultError(f"{len(messages)} messages: the last question has no answer")


def _in_words(conversation: Conversation) -> Conversation:
    """Refuse a question that names a picture as Qwen-VL does: the name would be trained on as words."""
    if not conversation.turns:
        raise RecordFaultError("there is no question behind the first message")
    for turn in conversation.turns:
        if not conversation.images and "<img>" in turn.user and (found := _QWEN_IMAGE.search(turn.user)):
            raise RecordFaultError(
                f"a question names a picture in Qwen-VL's way ({shown(found[0])}), which would train as text only: "
                f"name it in `image` or `images`, and put {IMAGE_SLOT} in its place"
            )
    return conversation


def _question(number: int, content: Any, slots_in_text: bool) -> tuple[Turn, list[Any]]:
    """A question without answer, and its images: None stands for the record's next one."""
    if not isinstance(content, list):
        text = _checked_text(number, content)
        turn = Turn(text, None) if slots_in_text or IMAGE_SLOT not in text else Turn(text, None, around=(text,))
        return turn, [None] * turn.num_images
    texts, images = [""], []
    for place, part in enumerate(content):
        found = _part(number, place, part)
        if isinstance(found, str):
            texts[-1] += _checked_text(number, found)
        else:
            texts.append("")
            images.append(found[0])
    literal = any(IMAGE_SLOT in text for text in texts)
    return Turn(IMAGE_SLOT.join(texts), None, tuple(texts) if literal else None), images


def _part(number: int, place: int, part: Any) -> str | tuple[Any]:
    """A part of a message: its text, or its image in a tuple, a video as {"video": what names it}."""
    name = part.get("type") if isinstance(part, dict) else None
    if name in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if name not in _IMAGE_PARTS + _VIDEO_PARTS:
        what = f"is of type {shown(name)}" if isinstance(part, dict) else f"is no object but {kind(part)}"
        raise RecordFaultError(f"part {place} of message {number} {what}; allowed: text, image_url, image, video_url")
    keys = (*_IMAGE_PARTS[:2], *_VIDEO_PARTS[:2], "path", "url")
    found = next((part[key] for key in keys if part.get(key) is not None), None)
    found = found["url"] if isinstance(found, dict) and "url" in found else found
    return ({"video": found} if name in _VIDEO_PARTS else found,)


def _plain_text(number: int, content: Any) -> Any:
    """A message that may hold no images."""
    if not isinstance(content, list):
        return content
    parts = [_part(number, place, part) for place, part in enumerate(content)]
    if not all(isinstance(part, str) for part in parts):
        raise RecordFaultError(f"message {number} has an image, but only questions can have images")
    return "".join(part for part in parts if isinstance(part, str))


def _list(record: dict[str, Any], key: str) -> list[Any]:
    messages = record.get(key)
    if not isinstance(messages, list):
        raise RecordFaultError(f"`{key}` must be a list of messages, but is {kind(messages)}")
    if not messages:
        raise RecordFaultError(f"`{key}` is empty")
    return messages


def _fields(number: int, message: Any, role: str, content: str) -> tuple[Any, Any]:
    if not isinstance(message, dict):
        raise RecordFaultError(f"message {number} is no object but {kind(message)}")
    return message.get(role), message.get(content)


def _in_turn(number: int, role: str, answer: bool) -> None:
    expected = ASSISTANT_ROLES if answer else USER_ROLES
    if role not in expected:
        raise RecordFaultError(f"message {number} is from '{role}' where one from '{expected[0]}' is due")


def _checked_text(number: int, text: Any) -> str:
    if not isinstance(text, str):
        raise RecordFaultError(f"the value of message {number} is no text but {kind(text)}")
    if is_broken(text):
        raise RecordFaultError(f"the value of message {number} holds half a character (a lone surrogate escape)")
    return text


def _named_images(record: dict[str, Any]) -> tuple[Any, ...]:
    """What the record's `image` or `images` names."""
    keys = [key for key in ("image", "images") if record.get(key) is not None]
    if len(keys) > 1:
        raise RecordFaultError("the record has both `image` and `images`; keep one")
    named = record[keys[0]] if keys else None
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list) else (named,)
