"""Reading what benchmarks lie in: question files, annotations, parquet tables, and the answer files to score.

Every error names file and record. pyarrow is imported where a parquet file is opened; nothing here decodes an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.benchmarks.spreadsheet import read_answer_sheet


def image_file(folder: Path, name: Any, where: str) -> ImageRef:
    """An image named by a question file, inside `folder`. Whether it exists shows when it is opened.

    Raises:
        DataError: no relative path, or one that climbs out of the folder; `where` names file and record.
    """
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DataError(f"{where}: image {name!r} must be a path inside {folder}. Correct the record.")
    return ImageRef(folder / name)


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: the file is missing or no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}). Fetch the file again.") from error


@dataclass(frozen=True)
class ParquetRow:
    """One row of a parquet file, without its images.

    Attributes:
        path, row: where it is; `image` makes a reference to one of its cells.
        values: the columns that were asked for; a column that the file lacks is None.
    """

    path: Path
    row: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """File and row, for messages."""
        return f"{self.path}, row {self.row}"

    def image(self, column: str = "image") -> ImageRef:
        """A reference to the image in `column` of this row."""
        return ImageRef(self.path, self.row, column)


def read_parquet(paths: Sequence[Path], required: Sequence[str], optional: Sequence[str] = ()) -> list[ParquetRow]:
    """Read some columns of a split; image columns stay on disk (name them to `ParquetRow.image`).

    Raises:
        DataError: a file cannot be read, or lacks a required column (the message lists those it has).
    """
    rows = []
    for path in paths:
        file = open_parquet(path)
        present = list(file.schema_arrow.names)
        lacking = [name for name in required if name not in present]
        if lacking:
            raise DataError(
                f"{path}: column {', '.join(lacking)} missing; it has {', '.join(present)}. Is it this benchmark?"
            )
        columns = [name for name in (*required, *optional) if name in present]
        records = file.read(columns=columns).to_pylist()
        blank = dict.fromkeys(optional)
        rows += [ParquetRow(path, number, {**blank, **record}) for number, record in enumerate(records)]
    return rows


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or not JSON (with line and column).
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({_reason(error)}). Fetch the file again.") from error


def read_list(path: Path) -> list[Any]:
    """Read a JSON file that holds a list of records.

    Raises:
        DataError: as `read_json`, or it holds something else.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list, found {type(records).__name__}. Fetch the file again.")
    return records


def read_object(path: Path, *fields: str) -> dict[str, Any]:
    """Read a JSON file that holds an object with all of `fields`.

    Raises:
        DataError: as `read_json`, or it holds something else.
    """
    record: dict[str, Any] = read_json(path)
    require(record, fields, str(path))
    return record


def read_jsonl(path: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line, whatever the file is called (POPE's labels are JSON lines in `.json`).

    Raises:
        DataError: it cannot be read, or a line is no object with the required fields; file and line are named.
    """
    records = []
    for where, record in _lines(path):
        require(record, required, where)
        records.append(record)
    return records


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    # by "\n" alone: an answer may hold U+2028 and the like, at which str.splitlines() would cut
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({_reason(error)}). Correct the line.") from error


def require(record: Any, fields: Sequence[str], where: str) -> None:
    """Raise DataError unless `record` is an object with all of `fields`; `where` names file and record."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}. Correct the record.")
    lacking = [name for name in fields if name not in record]
    if lacking:
        raise DataError(
            f"{where}: field {', '.join(lacking)} missing; needed are {', '.join(fields)}. Correct the record."
        )


def read_answer_file(path: Path) -> list[dict[str, Any]]:
    """Read an answer file: JSONL, a JSON list or an xlsx workbook of `{"question_id", "text", "prompt"?, ...}`; may be empty.

    VLMEvalKit and MMBench's server call the first two `index` and `prediction`, and have the `question` beside them.

    Raises:
        DataError: it is missing or unreadable, a row lacks a field, or a text is no string.
    """
    if not path.is_file():
        raise DataError(f"answer file {path} does not exist. It has one JSON object a line: question_id, prompt, text.")
    rows: Iterable[tuple[str, Any]]
    if path.suffix.lower() in (".xlsx", ".xlsm"):
        rows = ((f"{path}, row {number}", row) for number, row in read_answer_sheet(path))
    elif read_text(path).lstrip()[:1] == "[":
        rows = ((f"{path}, record {number}", row) for number, row in enumerate(read_json(path), 1))
    else:
        rows = _lines(path)
    return [_answer(row, where) for where, row in rows]


def _answer(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict) and "index" in row and "prediction" in row:
        row = {"question_id": row["index"], "text": row["prediction"], **row}
    require(row, ("question_id", "text"), where)
    if row["question_id"] is None:
        raise DataError(f"{where}: has no question_id. Say which question it answers.")
    text = "" if row["text"] is None else row["text"]  # None: a model that said nothing
    if not isinstance(text, str):
        raise DataError(f"{where}: `text` must be a string. Correct the record.")
    # TinyLLaVA's MMMU script writes the whole question list as the prompt
    return {**row, "text": text, "prompt": row["prompt"] if isinstance(row.get("prompt"), str) else None}


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "nested too deeply"
