"""Raw records of annotation files, one after the other: a file of any size is read in a few megabytes of memory.

A file is a JSON list, JSON lines (named `.jsonl`), or parquet (one file, or a folder of them). A file that cannot be read at
all is a `DataError`; what a record must look like is the business of `data/sample.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from io import BufferedReader, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from tinylmm.config.weight_files import refuse_pointer
from tinylmm.data.formats import PARSERS, kind
from tinylmm.errors import DataError

MAX_DIGITS = 4000
"""Of an integer in a file; Python's own limit is a little above."""
BLOCK = 1 << 20
"""Characters of a JSON list that are read at a time."""
_SPACE = " \t\n\r"
_UNSURE = 16
"""A value that is broken so few characters before the end of what was read may be cut off there: `\\ud83d\\ude00`."""


@dataclass
class Place:
    """How far a reader is: `done` of `total` units, which are bytes, or rows of parquet."""

    done: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


def read_records(path: Path, layout: str = "llava", place: Place | None = None) -> Iterator[Any]:
    """Yield the raw records of a JSON list, of JSON lines where the file's name ends in `.jsonl`, or of parquet rows.

    Args:
        layout: the source's `format`.
        place: is kept up to date with how far the reader is.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON (with line and column), no list of records, no parquet
            file, or a question file.
    """
    if layout not in PARSERS:
        raise DataError(
            f"{path}: its format is '{layout}', which cannot be trained on. Name a source of conversations; "
            f"formats of those: {', '.join(PARSERS)}."
        )
    place = Place() if place is None else place
    try:
        if path.is_file():
            refuse_pointer(path)
        if layout == "parquet" or path.suffix == ".parquet" or path.is_dir():
            yield from _read_parquet(path, layout, place)
            return
        with path.open("rb", buffering=0) as file:
            place.total = os.fstat(file.fileno()).st_size
            with TextIOWrapper(_Counted(file, place), encoding="utf-8-sig") as text:
                yield from _read_lines(path, text) if path.suffix == ".jsonl" else _JsonList(path, text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} of the part being read). Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


class _Counted(BufferedReader):
    """A binary file that notes in `place` how far it was read."""

    def __init__(self, file: FileIO, place: Place) -> None:
        super().__init__(file)
        self._place = place

    def read1(self, size: int | None = -1, /) -> bytes:
        data = super().read1(-1 if size is None else size)
        self._place.done += len(data)
        return data


def _read_parquet(path: Path, layout: str, place: Place) -> Iterator[Any]:
    from tinylmm.data.parquet import count_rows, read_rows

    if layout not in ("parquet", "auto"):
        raise DataError(f"{path}: parquet, but the source's format is '{layout}'. Set it to parquet or auto.")
    place.total = count_rows(path)
    for row in read_rows(path):
        place.done += 1
        yield row


def load_json(text: str) -> Any:
    """Decode JSON. Python reads no integer of more than MAX_DIGITS digits, so such a one becomes a Decimal.

    Raises:
        json.JSONDecodeError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MAX_DIGITS else Decimal(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def _read_lines(path: Path, text: TextIO) -> Iterator[Any]:
    empty = True
    for number, line in enumerate(text):
        if not line.strip():
            continue
        empty = False
        try:
            record = load_json(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _not_json(path, error, number, 0) from error
        yield record
    if empty:
        raise DataError(f"{path}: the file is empty; expected one JSON record a line. Fetch or build it again.")


class _JsonList:
    """Iterates over the elements of one JSON list, of which no more than a few blocks are in memory.

    Attributes:
        text, at: what was read and is not yet done with, and the position in it.
        line, column: of the file, where `text` begins (0-based).
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self.line = self.column = 0
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        if not self._next():
            raise DataError(
                f"{self.path}: the file is empty; expected a JSON list of records. Fetch or build it again."
            )
        if self._next() != "[":
            raise self._no_list()
        self.at += 1
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self.at += 1
                self._next()
                yield self._value()
        if self._next() != "]":
            raise self._broken("Expecting ',' delimiter")
        self.at += 1
        if self._next():
            raise self._broken("Extra data")

    def _next(self) -> str:
        """Go on to the next character that is no space, and return it; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
            if not self._read():
                return ""

    def _read(self, characters: int = BLOCK) -> bool:
        """Drop what is done with and read more; False at the end of the file."""
        done, self.text = self.text[: self.at], self.text[self.at :]
        self.at = 0
        lines = done.count("\n")
        self.line += lines
        self.column = len(done) - done.rfind("\n") - 1 if lines else self.column + len(done)
        more = self.file.read(characters)
        self.text += more
        self.ended = not more
        return bool(more)

    def _value(self) -> Any:
        """Decode the value that begins here. A longer one than what was read doubles it: its time stays linear."""
        while True:
            begin = self.at
            try:
                value, end = _DECODER.raw_decode(self.text, begin)
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Unterminated string") and error.pos < len(self.text) - _UNSURE:
                    raise self._broken(error.msg, error.pos) from error
                if not self._read(max(BLOCK, len(self.text))):
                    raise self._broken(error.msg, error.pos - begin) from error
                continue
            except RecursionError as error:
                raise _not_json(self.path, error, self.line, self.column) from error
            if end == len(self.text) and self._read():  # a number may go on
                continue
            self.at = end
            return value

    def _no_list(self) -> DataError:
        value = self._value()
        if self._next():
            return self._broken("Extra data")
        return DataError(f"{self.path}: the top level is {kind(value)}; expected a list of records ([{{...}}, ...]).")

    def _broken(self, what: str, at: int | None = None) -> DataError:
        error = json.JSONDecodeError(what, self.text, self.at if at is None else at)
        return _not_json(self.path, error, self.line, self.column)


def _not_json(path: Path, error: Exception, line: int, column: int) -> DataError:
    """Args: line, column: of the file, where the text begins that the error speaks of."""
    if isinstance(error, json.JSONDecodeError):
        at = error.colno + (column if error.lineno == 1 else 0)
        where = f"line {error.lineno + line}, column {at}: {error.msg}"
    else:
        where = f"line {1 + line}: nested too deeply"
    return DataError(
        f"{path}: not valid JSON ({where}). Fetch the file again if its end is missing; "
        "a file with one record a line must be named .jsonl."
    )
