"""Tables as MMBench has them: TSV files with base64 images in, xlsx workbooks of answers in and out.

Spreadsheet programs change such files when they save them: numbers lose zeros, "1/2" becomes a date, cells end at 32,767
characters, and the text of a TSV becomes UTF-16. What can be read all the same is read; what is lost is named.
"""

from __future__ import annotations

import base64
import binascii
import csv
import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef

TABLE = ".tsv"
"""Ending of a table that holds its images."""

_NAN = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "n/a",
        "null",
    )
)
"""Besides nan and none in any case, what pandas reads as no value. LLaVA's script reads the file with pandas, so an option
that is spelt "NA" ends the options there, and here."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_FIELD_LIMIT = 100_000_000
_LONGEST_INDEX = 64
"""An image cell of at most so many characters is no image, but the index of the row that holds it (VLMEvalKit's rule)."""
_CELL_LIMIT = 32_767
"""Spreadsheet programs cut the text of a cell off there."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def is_nan(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or a spelling of it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and (value in _NAN or value.lower().lstrip("-") in ("nan", "none"))


def whole_number(value: Any) -> int | None:
    """The number in a cell, also where a spreadsheet program made "241" a float ("241.0", 241.0); None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


# -------------------------------------------------------------------------------------------------- tables of questions


def read_tsv_images(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[dict[str, str | None], ImageRef]]:
    """Read a TSV whose columns `index` and `image` (base64) are among the required; rows with equal images share a reference.

    An image cell may also be the index of any other row, as in later releases. A cell that holds no image, which scoring does
    not need, gives a reference without bytes, which `image_fault` explains.

    Raises:
        DataError: the file cannot be read, or lacks a required column.
    """
    rows = list(_records(path, required))
    cells = {record["index"] or "": record["image"] or "" for record in rows}
    seen: dict[str, ImageRef] = {}
    for number, record in enumerate(rows, 1):
        cell = _image_cell(record, cells)
        # a bad cell is nobody else's: each row names its own
        image = seen.get(cell) if cell else None
        if image is None:
            image = seen[cell] = ImageRef(path, number, "image", _decoded(cell))
        yield {name: record.get(name) for name in (*required, *optional)}, image


def image_fault(path: Path, row: int) -> str:
    """Why the image cell of a row (from 1) of a TSV holds no image: one clause."""
    rows = list(_records(path, ("index", "image")))
    cell = rows[row - 1]["image"] or ""
    named = _image_cell(rows[row - 1], {record["index"] or "": record["image"] or "" for record in rows})
    if not cell:
        return "column image is empty"
    if len(cell) <= _LONGEST_INDEX and named == cell:
        return f"column image is {cell!r}, which is neither base64 nor the index of a row"
    if len(named) == _CELL_LIMIT:
        return f"column image ends after {_CELL_LIMIT:,} characters, as spreadsheet programs cut a cell off"
    return "column image is no base64"


def _records(path: Path, required: Sequence[str]) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(_FIELD_LIMIT)
    try:
        with path.open("rb") as file:
            if file.read(2) in _UTF16:
                raise DataError(f"{path}: is UTF-16 text, as spreadsheet programs save it. Fetch the file again.")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            present = reader.fieldnames or ()
            lacking = [name for name in required if name not in present]
            if lacking:
                raise DataError(f"{path}: column {', '.join(lacking)} missing; it has {', '.join(present)}.")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a TSV file ({error}). Fetch it again.") from error


def _image_cell(record: Mapping[str, str | None], cells: Mapping[str, str]) -> str:
    """The cell that holds a row's image: its own, or that of the row whose index it is."""
    cell = (record["image"] or "").strip()
    named = cells.get(cell, "") if len(cell) <= _LONGEST_INDEX else ""
    return named.strip() if len(named) > _LONGEST_INDEX else cell


def _decoded(cell: str) -> bytes | None:
    try:
        return base64.b64decode(cell, validate=True) or None
    except (binascii.Error, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------- workbooks


def read_answer_sheet(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Number and cells of each row of a workbook's first sheet, by the names in row 1: text, or None where a cell is empty.

    Numbers and TRUE come back as the text that they were made from, as far as that is known; a formula is the text it looks
    like. Rows without any cell are left out.

    Raises:
        DataError: no workbook, or a cell was made a date or cut off.
    """
    header, *rows = _sheet(path) or [[]]
    names = [str(name) for name in header]
    answers = []
    for number, cells in enumerate(rows, 2):
        if any(cell is not None for cell in cells):
            values = zip(names, cells, strict=False)
            where = f"{path}, row {number}, column"
            answers.append((number, {name: _plain(value, f"{where} {name}") for name, value in values}))
    return answers


def _sheet(path: Path) -> list[list[Any]]:
    import zipfile
    from xml.etree.ElementTree import ParseError

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        # not data_only: that reads the result of a formula, and an answer like "=1+1" has none
        book = load_workbook(path, read_only=True)
        rows = [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
        book.close()
    except (OSError, InvalidFileException, zipfile.BadZipFile, KeyError, ValueError, ParseError) as error:
        raise DataError(f"{path}: cannot be read as an xlsx workbook ({error}). Write it again.") from error
    return rows


def _plain(value: Any, where: str) -> str | None:
    """A cell's text, before a spreadsheet program took it for something else; None where it is empty."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        raise DataError(
            f"{where}: a spreadsheet program made this a date ({value}), and what the text was is lost. Write the file again, "
            "and do not save it in a spreadsheet program."
        )
    if isinstance(value, str) and len(value) >= _CELL_LIMIT:
        raise DataError(
            f"{where}: the text ends after {_CELL_LIMIT:,} characters, where workbooks cut a cell off. Take the answers from a "
            "JSONL file."
        )
    number = None if isinstance(value, str | bool) else whole_number(value)
    return None if value is None else str(value if number is None else number)


def write_sheet(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write one sheet as xlsx. Text stays text: "=1+1" is no formula, and control characters, which xlsx forbids, go."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(header))
    for row in rows:
        cells = []
        for value in row:
            cell = WriteOnlyCell(sheet)
            if isinstance(value, str):
                cell.value = _CONTROL.sub("", value)
                cell.data_type = "s"
            else:
                cell.value = value
            cells.append(cell)
        sheet.append(cells)
    book.save(path)
