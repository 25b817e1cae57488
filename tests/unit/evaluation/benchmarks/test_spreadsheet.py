"""Workbooks of answers, and what spreadsheet programs do to them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.files import read_answer_file
from tinylmm.evaluation.benchmarks.spreadsheet import read_tsv_images, whole_number, write_sheet


def sheet(path: Path, *rows: list[Any]) -> Path:
    """A workbook as a spreadsheet program saves it: cells have the types that it took them for."""
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


HEADER = ["index", "question", "A", "prediction"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("C", "C"),
        ("=1+1", "=1+1"),  # taken for a formula: it looks like what was said
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (True, "True"),
        (None, ""),
        ("#NAME?", "#NAME?"),
        ("a\nb", "a\nb"),
    ],
)
def test_a_cell_is_the_text_that_it_was_made_from(tmp_path: Path, cell: Any, text: str) -> None:
    path = sheet(tmp_path / "a.xlsx", HEADER, [241.0, "Which?", 1, cell])
    (row,) = read_answer_file(path)
    assert (row["question_id"], row["text"], row["question"]) == ("241", text, "Which?")


def test_llavas_names_do_as_well_and_empty_rows_are_none(tmp_path: Path) -> None:
    path = sheet(tmp_path / "a.xlsx", ["question_id", "prompt", "text"], [7, "q", "yes"], [None] * 3, [8, None, "no"])
    found = [(row["question_id"], row["prompt"], row["text"]) for row in read_answer_file(path)]
    assert found == [("7", "q", "yes"), ("8", None, "no")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [5, "q", "a", datetime.datetime(2026, 1, 2)],
            r"row 2, column prediction: a spreadsheet program made this a date",
        ),
        ([5, "q", "a", "x" * 32_767], r"row 2, column prediction: the text ends after 32,767 characters"),
        ([None, "q", "a", "B"], r"row 2: has no question_id"),
    ],
)
def test_what_is_lost_is_named(tmp_path: Path, row: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.xlsx, {message}"):
        read_answer_file(sheet(tmp_path / "a.xlsx", HEADER, row))


def test_a_workbook_without_the_columns_and_no_workbook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.xlsx, row 2: field text missing; needed are question_id, text"):
        read_answer_file(sheet(tmp_path / "a.xlsx", ["question_id", "said"], [1, "x"]))
    (tmp_path / "b.xlsx").write_text("index,prediction\n1,A\n")
    with pytest.raises(DataError, match=r"b\.xlsx: cannot be read as an xlsx workbook"):
        read_answer_file(tmp_path / "b.xlsx")


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "'A", "1/2", "TRUE", "0.50", "nan", "  a ", "é\u2028"]
    write_sheet(tmp_path / "a.xlsx", ["index", "prediction"], [[n, text] for n, text in enumerate(texts)])
    assert [row["text"] for row in read_answer_file(tmp_path / "a.xlsx")] == texts


def test_a_list_of_index_and_prediction_does_as_json_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"index": 5, "prediction": "A"}]')
    assert read_answer_file(tmp_path / "a.json")[0]["question_id"] == 5
    assert read_answer_file(tmp_path / "a.json")[0]["text"] == "A"


def test_a_table_saved_as_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("index\timage\n1\tx\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"x\.tsv: is UTF-16 text, as spreadsheet programs save it"):
        list(read_tsv_images(tmp_path / "x.tsv", ("index", "image")))


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("241", 241),
        ("241.0", 241),
        (241.0, 241),
        ("1e6", 1_000_000),
        ("1.5", None),
        ("nan", None),
        ("inf", None),
        (None, None),
    ],
)
def test_whole_numbers_are_read_as_spreadsheets_write_them(cell: Any, number: int | None) -> None:
    assert whole_number(cell) == number
