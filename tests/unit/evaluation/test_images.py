"""Which questions are about the same image, and opening it: a file, a cell, or bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.evaluation.benchmarks.qa_folders import cell, png, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.files import image_file, read_parquet
from tinylmm.evaluation.benchmarks.records import ImageRef, Item
from tinylmm.evaluation.images import cluster_of, content_keys, first_refs, open_image_ref

RED, BLUE = (255, 0, 0), (0, 0, 255)


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


def test_a_file_a_cell_and_bytes_open_as_rgb(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(RED))
    assert open_image_ref(image_file(tmp_path, "a.png", "here")).getpixel((0, 0)) == RED
    rows = [{"id": n, "image": cell(BLUE if n == 2 else RED)} for n in range(5)]
    path = write_parquet(tmp_path / "x.parquet", rows, row_group=2)
    refs = [row.image() for row in read_parquet([path], ("id",))]
    assert [open_image_ref(ref).getpixel((0, 0)) for ref in refs] == [RED, RED, BLUE, RED, RED]
    assert len({ref.key for ref in refs}) == 5
    assert open_image_ref(ImageRef(tmp_path / "x.tsv", data=png(BLUE))).mode == "RGB"


def test_bad_images_are_named_with_their_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"image": {"bytes": b"no image", "path": "p"}}])
    with pytest.raises(DataError, match=r"x\.parquet#0\.image: not a readable"):
        open_image_ref(ImageRef(path, 0, "image"))
    with pytest.raises(DataError, match="has no row"):
        open_image_ref(ImageRef(path, 1, "image"))
    with pytest.raises(DataError, match="does not exist"):
        open_image_ref(ImageRef(tmp_path / "gone.jpg"))
    path = write_parquet(tmp_path / "y.parquet", [{"image": "text"}])
    with pytest.raises(DataError, match=r"y\.parquet, row 0: column image holds no image bytes"):
        open_image_ref(ImageRef(path, 0, "image"))


def test_too_many_pixels_are_refused_in_a_cell_too(tmp_path: Path) -> None:
    Image.new("1", (10_000, 5_001)).save(tmp_path / "big.png")
    data = (tmp_path / "big.png").read_bytes()
    with pytest.raises(DataError, match="too large"):
        open_image_ref(ImageRef(tmp_path / "x.tsv", data=data))


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "", None, "a/../../b.jpg", "a\0b"])
def test_an_image_name_cannot_leave_its_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(DataError, match=r"line 3: image .* must be a path inside"):
        image_file(tmp_path, name, "line 3")


def test_a_cell_with_a_list_of_images_stands_for_the_first_and_equal_ones_are_the_same(tmp_path: Path) -> None:
    rows = [{"id": n, "image": [cell(colour), cell(RED)]} for n, colour in enumerate((BLUE, RED, BLUE))]
    path = write_parquet(tmp_path / "x.parquet", rows)
    refs = [row.image() for row in read_parquet([path], ("id",))]
    assert [open_image_ref(ref).getpixel((0, 0)) for ref in refs] == [BLUE, RED, BLUE]
    keys = content_keys([item(n, ref) for n, ref in enumerate(refs)])
    assert keys[refs[0].key] == keys[refs[2].key] != keys[refs[1].key]
