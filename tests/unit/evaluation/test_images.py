"""Equal images have equal keys, in files, parquet cells and TSV bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import ImageRef, Item
from tinylmm.evaluation.images import cluster_of, content_keys, first_refs


def item(number: int, *refs: ImageRef) -> Item:
    return Item(str(number), number, "?", refs)


def test_bytes_decide_where_they_are_repeated(tmp_path: Path) -> None:
    table = tmp_path / "test.parquet"
    cells = [{"bytes": data, "path": None} for data in (b"cat", b"dog", b"cat", None)]
    pq.write_table(pa.table({"image": cells}), table)
    tsv = [ImageRef(tmp_path / "a.tsv", row, "image", data) for row, data in ((0, b"dog"), (1, b"cow"))]
    items = [item(n, ImageRef(table, n, "image")) for n in range(4)] + [item(4 + n, ref) for n, ref in enumerate(tsv)]
    items += [item(6, ImageRef(tmp_path / "b.png")), item(7, *tsv), item(8)]
    keys = content_keys(items)
    clusters = [cluster_of(each, keys) for each in items]
    assert clusters[0] == clusters[2] and clusters[1] == clusters[4] and len(set(clusters)) == 7
    assert clusters[6] == str(tmp_path / "b.png") and clusters[8] == "item 8"
    assert len(first_refs(items, keys)) == 5 and first_refs(items, keys)[keys[tsv[0].key]] == items[1].images[0]


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"x\.parquet: column image cannot be read"):
        content_keys([item(0, ImageRef(tmp_path / "x.parquet", 0, "image"))])
