"""A benchmark's images: which questions are about the same one, and opening it. No torch before an image is opened.

Files name an image by its path; parquet tables and TSVs repeat its bytes with every question about it. There the bytes
decide, so that the tower runs once an image and its questions hang together in whatever form a benchmark comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.data.frame_sampling import frame_indices
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.files import open_parquet
from tinylmm.evaluation.benchmarks.records import ImageRef, Item
from tinylmm.evaluation.benchmarks.spreadsheet import TABLE, image_fault, read_tsv_images

if TYPE_CHECKING:
    from PIL import Image

_ROWS = 256
_MIDDLE = SamplingSpec(segments=1)


def content_keys(items: Sequence[Item]) -> dict[str, str]:
    """`ImageRef.key` -> a key that is equal for equal images: of a file its own, of bytes and parquet cells their SHA-256.

    Raises:
        DataError: a parquet file cannot be read.
    """
    refs = {ref.key: ref for item in items for ref in item.images}
    keys: dict[str, str] = {}
    cells: dict[tuple[Path, str], dict[int, str]] = {}
    for key, ref in refs.items():
        if ref.data is not None:
            keys[key] = _digest(ref.data)
        elif ref.row is not None and ref.column is not None and ref.path.suffix != TABLE:
            cells.setdefault((ref.path, ref.column), {})[ref.row] = key
        else:
            keys[key] = key
    for (path, column), rows in cells.items():
        keys |= _cell_keys(path, column, rows)
    return keys


def cluster_of(item: Item, keys: Mapping[str, str]) -> str:
    """What an item's answers hang together by: its images, or nothing but itself."""
    return "|".join(keys[ref.key] for ref in item.images) or f"item {item.item_id}"


def first_refs(items: Sequence[Item], keys: Mapping[str, str]) -> dict[str, ImageRef]:
    """One reference to open for each content key."""
    found: dict[str, ImageRef] = {}
    for item in items:
        for ref in item.images:
            found.setdefault(keys[ref.key], ref)
    return found


def image_digests(refs: Mapping[str, ImageRef]) -> dict[str, str]:
    """Key -> SHA-256 of the encoded image, of files, cells and bytes alike; without those that are not there.

    Raises:
        DataError: a parquet file or table cannot be read.
    """
    found: dict[str, str] = {}
    for key, ref in refs.items():
        if ref.data is not None:
            found[key] = _digest(ref.data)
        elif ref.row is None and ref.path.is_file():
            found[key] = _digest(ref.path.read_bytes())
        elif ref.row is not None and ref.column is not None and ref.path.is_file():
            data = _cell_bytes(ref.path, ref.row, ref.column)
            found |= {} if data is None else {key: _digest(data)}
    return found


def open_image_ref(ref: ImageRef) -> Image.Image:
    """Decode an image file, a parquet cell or the bytes that the benchmark's file held, as RGB; of a video its middle frame.

    Raises:
        DataError: missing, no image of a known format, damaged or too large; the message names file and row.
    """
    from tinylmm.data.images import open_image

    if ref.data is not None:
        return open_image(Path(ref.key), ref.data, ref.upright)
    if ref.fps is not None and ref.path.is_dir():
        from tinylmm.data.frame_folders import folder_clip, folder_frames

        return folder_frames(ref.path, frame_indices(_MIDDLE, folder_clip(ref.path, ref.fps), ref.part))[0]
    if not ref.path.is_file():
        what = "video" if ref.video else "image"
        raise DataError(f"{what} {ref.path} does not exist. Put the benchmark's {what}s there.")
    if ref.video:
        from tinylmm.data.video import sample_frames

        return sample_frames(ref.path, _MIDDLE, ref.part)[0]
    if ref.row is None or ref.column is None:
        return open_image(ref.path, upright=ref.upright)
    data = _cell_bytes(ref.path, ref.row, ref.column)
    if data is None:
        fault = (
            f"column {ref.column} holds no image bytes" if ref.path.suffix != TABLE else image_fault(ref.path, ref.row)
        )
        raise DataError(f"{ref.path}, row {ref.row}: {fault}. Fetch the file again.")
    return open_image(Path(ref.key), data, ref.upright)


def _cell_bytes(path: Path, row: int, column: str) -> bytes | None:
    """The encoded image in a cell of a parquet file or of a TSV."""
    if path.suffix == TABLE:
        return _table_cells(path, path.stat().st_mtime_ns).get(row)
    return _encoded(_cell(path, row, column))


@lru_cache(maxsize=1)  # as large as the file: pages show a few images of one benchmark after the other
def _table_cells(path: Path, stamp: int) -> dict[int, bytes]:
    rows = enumerate(read_tsv_images(path, ("index", "image")), 1)
    return {number: ref.data for number, (_, ref) in rows if ref.data is not None}


def _encoded(cell: Any) -> bytes | None:
    """The encoded image in a cell: bytes, bytes beside a path as `datasets` writes them, or the first of a list of either."""
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None


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
    metadata = open_parquet(path).metadata
    return tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


@lru_cache(maxsize=4)  # items come in the order of their images, so neighbours share a row group
def _group_column(path: Path, stamp: int, group: int, column: str) -> Any:
    return open_parquet(path).read_row_group(group, columns=[column]).column(0)


def _cell_keys(path: Path, column: str, rows: Mapping[int, str]) -> dict[str, str]:
    """Read a column of encoded images once, a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys: dict[str, str] = {}
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS, columns=[column]):
            for cell in batch.column(0).to_pylist():
                if row in rows:
                    data = _encoded(cell)
                    # a cell without bytes keeps its own key: opening it says what is wrong with it
                    keys[rows[row]] = rows[row] if data is None else _digest(data)
                row += 1
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: column {column} cannot be read as parquet ({error}). Fetch the file again."
        ) from error
    return {**{key: key for key in rows.values()}, **keys}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
