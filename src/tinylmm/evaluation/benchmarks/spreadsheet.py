"""Tables as MMBench has them: TSV files with base64 images in, an xlsx workbook out."""

from __future__ import annotations

import base64
import binascii
import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef

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


def is_nan(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or a spelling of it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and (value in _NAN or value.lower().lstrip("-") in ("nan", "none"))


def read_tsv_images(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[dict[str, str | None], ImageRef]]:
    """Read a TSV whose column `image` holds base64, row by row; rows with equal images share one reference.

    An image cell may also be the `index` of an earlier row with the same image, as in later releases.

    Raises:
        DataError: the file cannot be read, lacks a required column, or an image is neither.
    """
    seen: dict[str, ImageRef] = {}
    by_index: dict[str, ImageRef] = {}
    csv.field_size_limit(_FIELD_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            present = reader.fieldnames or ()
            lacking = [name for name in required if name not in present]
            if lacking:
                raise DataError(f"{path}: column {', '.join(lacking)} missing; it has {', '.join(present)}.")
            for number, record in enumerate(reader, 1):
                cell = record["image"] or ""
                image = seen.get(cell) or by_index.get(cell)
                if image is None:
                    data = _decoded(cell, f"{path}, row {number}")
                    image = seen[cell] = ImageRef(path, number, "image", data)
                by_index[record["index"] or ""] = image
                yield {name: record.get(name) for name in (*required, *optional)}, image
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a TSV file ({error}). Fetch it again.") from error


def _decoded(cell: str, where: str) -> bytes:
    try:
        data = base64.b64decode(cell.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: column image is no base64 ({error}). Fetch the file again.") from error
    if not data:
        raise DataError(f"{where}: column image is empty. Fetch the file again.")
    return data


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
