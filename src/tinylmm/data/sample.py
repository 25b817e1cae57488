"""The one internal sample, and the reader that makes it out of annotation files.

A file is a JSON list, JSON lines (named `.jsonl`), or parquet (one file, or a folder of them). What a record looks like is
the source's `format`; `data/formats.py` reads each. A record that breaks a rule is handed on as a `BadRecord` with the
reason, so that the caller decides what becomes of it; a file that cannot be read at all is a `DataError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from tinylmm.config.weight_files import refuse_pointer
from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.formats import PARSERS, RecordFaultError, is_broken, kind, shown
from tinylmm.data.image_names import name_images
from tinylmm.data.segments import Turn
from tinylmm.errors import DataError, printable

MAX_DIGITS = 4000
"""Of an integer in a file; Python's own limit is a little above."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        sample_id: the record's `id` as text, or its index where it has none; need not be unique.
        turns: complete turns; `<image>` in a question is an image slot, as many as there are images.
        images: paths relative to the source's image folder, or names of embedded ones, in the order of their slots.
        system: the conversation's own system message; None leaves it to the chat template.
        greeted: the record began with an answer, which is left out.
        embedded: bytes of the embedded images by name.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str | None = None
    greeted: bool = False
    embedded: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its 0-based position in the file, its id and the reason, both fit to be shown."""

    index: int
    sample_id: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_id", printable(self.sample_id, keep=""))
        object.__setattr__(self, "reason", printable(self.reason, keep=""))


def read_samples(path: Path, layout: str = "llava") -> Iterator[Sample | BadRecord]:
    """Yield every record of an annotation file, in file order. JSON lines and parquet are streamed, a JSON list is loaded.

    Args:
        layout: the source's `format`.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON (with line and column), no list of records, no parquet
            file, or a question file.
    """
    for index, record in enumerate(read_records(path, layout)):
        yield parse_record(index, record, layout)


def read_records(path: Path, layout: str = "llava") -> Iterator[Any]:
    """Yield the raw records of a JSON list, of JSON lines where the file's name ends in `.jsonl`, or of parquet rows.

    Raises:
        DataError: as `read_samples`.
    """
    if layout not in PARSERS:
        raise DataError(
            f"{path}: its format is '{layout}', which cannot be trained on. Name a source of conversations; "
            f"formats of those: {', '.join(PARSERS)}."
        )
    try:
        if path.is_file():
            refuse_pointer(path)
        if layout == "parquet" or path.suffix == ".parquet" or path.is_dir():
            from tinylmm.data.parquet import read_rows

            if layout not in ("parquet", "auto"):
                raise DataError(f"{path}: parquet, but the source's format is '{layout}'. Set it to parquet or auto.")
            yield from read_rows(path)
        elif path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield from _read_list(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} of the part being read). Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def parse_record(index: int, record: Any, layout: str = "llava") -> Sample | BadRecord:
    """Turn one record into a sample, or say why it is none.

    Args:
        index: 0-based position in the file; stands in for a missing id.
        record: what the file held there, of any type.
        layout: the source's `format`.
    """
    given = record.get("id") if isinstance(record, dict) else None
    sample_id = str(index) if given is None else given if isinstance(given, str) else _id_text(given)
    try:
        if is_broken(sample_id):
            raise RecordFaultError("its `id` holds half a character (a lone surrogate escape)")
        return _parse(record, sample_id, layout)
    except RecordFaultError as fault:
        return BadRecord(index, sample_id, str(fault))


def _id_text(given: Any) -> str:
    """An id that is no text, as text: a number as it is, anything else in short."""
    return str(given) if isinstance(given, (int, float, Decimal)) else shown(given)


def _parse(record: Any, sample_id: str, layout: str) -> Sample:
    if not isinstance(record, dict):
        raise RecordFaultError(f"the record is no object but {kind(record)}")
    if record.get("video") is not None:
        raise RecordFaultError("the record has a `video`, which this version cannot read yet")
    conversation = PARSERS[layout](record)
    images, embedded = name_images(conversation.images)
    slots = sum(turn.num_images for turn in conversation.turns)
    if slots != len(images):
        raise RecordFaultError(f"its questions have {slots} {IMAGE_SLOT} but the record names {len(images)} images")
    return Sample(sample_id, conversation.turns, images, conversation.system, conversation.greeted, embedded)


def load_json(text: str) -> Any:
    """Decode JSON. Python reads no integer of more than MAX_DIGITS digits, so such a one becomes a Decimal.

    Raises:
        json.JSONDecodeError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MAX_DIGITS else Decimal(digits)


def _read_list(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected a JSON list of records. Fetch or build it again.")
    try:
        records = load_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(path, error, line_offset=0) from error
    if not isinstance(records, list):
        raise DataError(f"{path}: the top level is {kind(records)}; expected a list of records ([{{...}}, ...]).")
    yield from records


def _read_lines(path: Path) -> Iterator[Any]:
    empty = True
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            empty = False
            try:
                yield load_json(line)
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
