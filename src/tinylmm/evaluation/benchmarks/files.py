"""Reading what benchmarks lie in: question files, annotations, parquet, images, and the answer files to score.

A missing file is one sentence: which, where it was looked for, where to get it. pyarrow is imported where a parquet file is
opened, Pillow's checks where an image is; nothing here imports torch before an image is decoded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from tinylmm.evaluation.benchmarks.base import Answer, ImageRef, Item


@dataclass(frozen=True)
class Place:
    """Where a benchmark's files may lie: `root` is the benchmark's own folder, or the one around it (`playground/data/eval`).

    Attributes:
        root: what the user named.
        folder: the benchmark's official folder name (`gqa`, `MME`).
        get: where the files come from, one sentence; ends every message about a missing file.
    """

    root: Path
    folder: str
    get: str

    def candidates(self, names: Iterable[str]) -> list[Path]:
        """All places where any of `names` may lie, the benchmark's own folder first."""
        bases = [self.root] if self.root.name == self.folder else [self.root / self.folder, self.root]
        return [base / name for base in bases for name in names]

    def find(self, *names: str) -> Path | None:
        """The first of `names` that exists, or None."""
        return next((path for path in self.candidates(names) if path.exists()), None)

    def file(self, *names: str) -> Path:
        """The first of `names` that exists.

        Raises:
            DataError: none does; the message lists all places and says where to get the file.
        """
        found = self.find(*names)
        if found is None:
            raise self.missing(names[0].rsplit("/", 1)[-1], self.candidates(names))
        return found

    def missing(self, what: str, looked_for: Sequence[Path]) -> DataError:
        """The error of a missing file."""
        if not self.root.is_dir():
            return DataError(
                f"{self.root}: no such folder. It should be the {self.folder} folder or the one around it. {self.get}"
            )
        places = ", ".join(str(path) for path in looked_for)
        return DataError(f"{what} not found; looked for {places}. {self.get}")

    def image_folder(self, *names: str) -> Path:
        """The first of `names` that exists, else where the first should lie: scoring needs no images."""
        return self.find(*names) or self.candidates(names)[0]

    def parquet(self, split: str, *configs: str) -> list[Path]:
        """The shards of a split (`test-00000-of-00003*.parquet` or `test.parquet`), in order, as `hf download` writes them.

        Args:
            split: the split's name.
            configs: names of the config, best first; `data` and no folder at all are tried after them.

        Raises:
            DataError: there is none.
        """
        shards = self._shards(split, configs)
        if not shards:
            raise self.missing(f"{split}-*.parquet", self.candidates([*configs, "data", ""]))
        return shards

    def has_parquet(self, split: str, *configs: str) -> bool:
        """Whether `parquet` would find the split."""
        return bool(self._shards(split, configs))

    def _shards(self, split: str, configs: Sequence[str]) -> list[Path]:
        for folder in self.candidates([*configs, "data", ""]):
            shards = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
            if shards:
                return shards
        return []


def image_file(folder: Path, name: Any, where: str) -> ImageRef:
    """An image named by a question file, inside `folder`. Whether it exists shows when it is opened.

    Raises:
        DataError: no relative path, or one that climbs out of the folder; `where` names file and record.
    """
    from tinylmm.evaluation.benchmarks.base import ImageRef

    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DataError(f"{where}: image {name!r} must be a path inside {folder}. Correct the record.")
    return ImageRef(folder / name)


def open_image_ref(ref: ImageRef) -> Image.Image:
    """Decode an image file, a parquet cell or the bytes that the benchmark's file held, as RGB.

    Raises:
        DataError: missing, no image of a known format, damaged or too large; the message names file and row.
    """
    from tinylmm.data.images import open_image

    if ref.data is not None:
        return open_image(Path(ref.key), ref.data)
    if not ref.path.is_file():
        raise DataError(f"image {ref.path} does not exist. Put the benchmark's images there.")
    if ref.row is None or ref.column is None:
        return open_image(ref.path)
    cell = _cell(ref.path, ref.row, ref.column)
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(f"{ref.path}, row {ref.row}: column {ref.column} holds no image bytes. Fetch the file again.")
    return open_image(Path(ref.key), data)


def _cell(path: Path, row: int, column: str) -> Any:
    """One cell, by reading its row group only."""
    stamp = path.stat().st_mtime_ns
    for group, rows in enumerate(_group_sizes(path, stamp)):
        if row < rows:
            return _group_column(path, stamp, group, column)[row].as_py()
        row -= rows
    raise DataError(f"{path}: has no row {row}. Fetch the file again.")


@lru_cache(maxsize=64)
def _group_sizes(path: Path, stamp: int) -> tuple[int, ...]:
    metadata = _open_parquet(path).metadata
    return tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


@lru_cache(maxsize=4)  # items come in the order of their images, so neighbours share a row group
def _group_column(path: Path, stamp: int, group: int, column: str) -> Any:
    return _open_parquet(path).read_row_group(group, columns=[column]).column(0)


def _open_parquet(path: Path) -> Any:
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
        from tinylmm.evaluation.benchmarks.base import ImageRef

        return ImageRef(self.path, self.row, column)


def read_parquet(paths: Sequence[Path], required: Sequence[str], optional: Sequence[str] = ()) -> list[ParquetRow]:
    """Read some columns of a split; image columns stay on disk (name them to `ParquetRow.image`).

    Raises:
        DataError: a file cannot be read, or lacks a required column (the message lists those it has).
    """
    rows = []
    for path in paths:
        file = _open_parquet(path)
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


def read_jsonl(path: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line, whatever the file is called (POPE's labels are JSON lines in `.json`).

    Raises:
        DataError: it cannot be read, or a line is no object with the required fields; file and line are named.
    """
    records = []
    # by "\n" alone: an answer may hold U+2028 and the like, at which str.splitlines() would cut
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({_reason(error)}). Correct the line.") from error
        require(record, required, f"{path}, line {number}")
        records.append(record)
    return records


def require(record: Any, fields: Sequence[str], where: str) -> None:
    """Raise DataError unless `record` is an object with all of `fields`; `where` names file and record."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}. Correct the record.")
    lacking = [name for name in fields if name not in record]
    if lacking:
        raise DataError(
            f"{where}: field {', '.join(lacking)} missing; needed are {', '.join(fields)}. Correct the record."
        )


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read a LLaVA-style answer file: JSONL (or a JSON list) of `{"question_id", "text", "prompt"?, ...}`; may be empty.

    Raises:
        DataError: it is missing or unreadable, a row lacks `question_id` or `text`, or a text is no string.
    """
    if not path.is_file():
        raise DataError(f"answer file {path} does not exist. It has one JSON object a line: question_id, prompt, text.")
    if read_text(path).lstrip()[:1] == "[":
        rows = read_json(path)
        for number, row in enumerate(rows, 1):
            require(row, ("question_id", "text"), f"{path}, record {number}")
    else:
        rows = read_jsonl(path, ("question_id", "text"))
    for number, row in enumerate(rows, 1):
        if row["text"] is None:  # a model that said nothing
            row["text"] = ""
        if not isinstance(row["text"], str):
            raise DataError(f"{path}, answer {number}: `text` must be a string. Correct the record.")
        if not isinstance(row.get("prompt"), str):  # TinyLLaVA's MMMU script writes the whole question list here
            row["prompt"] = None
    return rows


def join_by_question_id(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Answer]:
    """Match answers to items by question id (an id may be a number in one file and text in the other).

    Of an id that is answered twice the later row counts, as in LLaVA's scripts; `tinylmm score` counts such rows.

    Raises:
        DataError: an answered id belongs to no item.
    """
    return join_by_key(items, rows, lambda item: str(item.question_id), lambda row: str(row["question_id"]))


def join_by_key(
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Any]],
    item_key: Callable[[Item], Any],
    row_key: Callable[[Mapping[str, Any]], Any],
) -> dict[str, Answer]:
    """Match answers to items by any key of their contents; items that share a key share the answer.

    Raises:
        DataError: a row's key belongs to no item.
    """
    from tinylmm.evaluation.benchmarks.base import Answer

    targets: dict[Any, list[str]] = defaultdict(list)
    for item in items:
        targets[item_key(item)].append(item.item_id)
    answers: dict[str, Answer] = {}
    for number, row in enumerate(rows, 1):
        found = targets.get(row_key(row))
        if not found:
            raise DataError(
                f"answer {number}, question_id {row['question_id']!r}: no such question among the {len(items)} of the "
                "question file. Score the answers against the question file they were made from."
            )
        answers.update(dict.fromkeys(found, Answer(row["text"], row.get("prompt"))))
    return answers


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
