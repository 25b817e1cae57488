"""Which questions are about the same image. No torch.

Files name an image by its path; parquet tables and TSVs repeat its bytes with every question about it. There the bytes
decide, so that the tower runs once an image and its questions hang together in whatever form a benchmark comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import ImageRef, Item

_ROWS = 256


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
        elif ref.row is not None and ref.column is not None:
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
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    # a cell without bytes keeps its own key: opening it says what is wrong with it
                    keys[rows[row]] = _digest(data) if isinstance(data, bytes) else rows[row]
                row += 1
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: column {column} cannot be read as parquet ({error}). Fetch the file again."
        ) from error
    return {**{key: key for key in rows.values()}, **keys}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
