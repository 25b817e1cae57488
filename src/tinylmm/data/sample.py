"""The one internal sample, and the reader that makes it out of LLaVA annotation files.

LLaVA's format is a JSON list (or JSON lines in a file named `.jsonl`) of records `{"id", "image", "conversations"}`:
`image` is a path or a list of paths (absent: text only) and `conversations` alternates between human and gpt. A record
that breaks a rule is handed on as a `BadRecord` with the reason, so that the caller decides what becomes of it; a file
that cannot be read at all is a `DataError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylmm.data.chat import IMAGE_SLOT, Turn
from tinylmm.errors import DataError

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        sample_id: the record's `id` as text, or its index where it has none; need not be unique.
        turns: complete turns; `<image>` in a question is an image slot, as many as there are images.
        images: paths relative to the source's image folder, in the order of their slots.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its 0-based position in the file, its id and the reason."""

    index: int
    sample_id: str
    reason: str


class _FaultError(Exception):
    """Carries a reason from wherever it is found to `parse_record`."""


def read_samples(path: Path) -> Iterator[Sample | BadRecord]:
    """Yield every record of a LLaVA annotation file, in file order. JSON lines are streamed, a JSON list is loaded.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON (with line and column), or no list of records.
    """
    for index, record in enumerate(read_records(path)):
        yield parse_record(index, record)


def read_records(path: Path) -> Iterator[Any]:
    """Yield the raw records of a JSON list, or of JSON lines where the file's name ends in `.jsonl`.

    Raises:
        DataError: as `read_samples`.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield from _read_list(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} of the part being read). Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def parse_record(index: int, record: Any) -> Sample | BadRecord:
    """Turn one LLaVA record into a sample, or say why it is none.

    Args:
        index: 0-based position in the file; stands in for a missing id.
        record: what JSON held there, of any type.
    """
    given = record.get("id") if isinstance(record, dict) else None
    sample_id = str(index if given is None else given)
    try:
        return _parse(record, sample_id)
    except _FaultError as fault:
        return BadRecord(index, sample_id, str(fault))


def _parse(record: Any, sample_id: str) -> Sample:
    if not isinstance(record, dict):
        raise _FaultError(f"the record is no object but {_kind(record)}")
    if "video" in record:
        raise _FaultError("the record has a `video`, which this version cannot read yet")
    turns = _turns(record.get("conversations"))
    images = _images(record.get("image"))
    slots = sum(turn.user.count(IMAGE_SLOT) for turn in turns)
    if slots != len(images):
        raise _FaultError(f"its questions have {slots} {IMAGE_SLOT} but the record names {len(images)} images")
    return Sample(sample_id, turns, images)


def _turns(conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list):
        raise _FaultError(f"`conversations` must be a list of messages, but is {_kind(conversations)}")
    if not conversations:
        raise _FaultError("`conversations` is empty")
    if len(conversations) % 2:
        raise _FaultError(f"{len(conversations)} messages: the last question has no answer, or a message is missing")
    texts = [_message(number, message) for number, message in enumerate(conversations)]
    return tuple(Turn(user, answer) for user, answer in zip(texts[::2], texts[1::2], strict=True))


def _message(number: int, message: Any) -> str:
    """The text of message `number`; even ones are the user's, odd ones the assistant's."""
    if not isinstance(message, dict):
        raise _FaultError(f"message {number} is no object but {_kind(message)}")
    role, text = message.get("from"), message.get("value")
    expected = ASSISTANT_ROLES if number % 2 else USER_ROLES
    if role not in USER_ROLES + ASSISTANT_ROLES:
        raise _FaultError(f"message {number} is from unknown role {role!r}; allowed: {USER_ROLES + ASSISTANT_ROLES}")
    if role not in expected:
        raise _FaultError(f"message {number} is from '{role}' where one from '{expected[0]}' is due")
    if not isinstance(text, str):
        raise _FaultError(f"the value of message {number} is no text but {_kind(text)}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _FaultError(f"the value of message {number} holds half a character (a lone surrogate escape)")
    if number % 2 and not text.strip():
        raise _FaultError(f"message {number} is an empty answer")
    return text


def _images(image: Any) -> tuple[str, ...]:
    if image is None:
        return ()
    images = image if isinstance(image, list) else [image]
    for path in images:
        if not isinstance(path, str) or not path:
            raise _FaultError(f"`image` must be a path or a list of paths, but holds {path!r}")
    return tuple(images)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _read_list(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected a JSON list of records. Fetch or build it again.")
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(path, error, line_offset=0) from error
    if not isinstance(records, list):
        raise DataError(f"{path}: the top level is {_kind(records)}; expected a list of records ([{{...}}, ...]).")
    yield from records


def _read_lines(path: Path) -> Iterator[Any]:
    empty = True
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            empty = False
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _not_json(path, error, line_offset=number) from error
    if empty:
        raise DataError(f"{path}: the file is empty; expected one JSON record a line. Fetch or build it again.")


def _not_json(path: Path, error: Exception, line_offset: int) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno + line_offset}, column {error.colno}: {error.msg}"
    else:
        where = f"line {1 + line_offset}: nested too deeply"
    return DataError(
        f"{path}: not valid JSON ({where}). Fetch the file again if its end is missing; "
        "a file with one record a line must be named .jsonl."
    )
