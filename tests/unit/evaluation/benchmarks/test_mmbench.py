"""MMBench: the TSV with base64 images, rotations, both rule sets, the judge for the rest, and the workbook to upload."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook

from tests.unit.evaluation.benchmarks.disk import by_id, cell, given, png, scored, write_parquet
from tests.unit.evaluation.judge_server import completion, judge_server
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.mmbench import MMBench
from tinylmm.evaluation.images import open_image_ref
from tinylmm.evaluation.judge import Judge

COLUMNS = "index question hint A B C D answer category image source l2-category comment split".replace(" ", ",").split(
    ","
)
SUFFIX = "Answer with the option's letter from the given choices directly."
RED = base64.b64encode(png()).decode()
BLUE = base64.b64encode(png((0, 0, 255))).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pandas writes it: tab-separated, cells with quotes or line breaks quoted, no value as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def question(index: int, options: str, answer: str, image: str = RED, **more: str) -> dict[str, Any]:
    texts = dict(zip("ABCD", options.split(","), strict=False))
    base = {"category": "color", "l2-category": "perception", "source": "s", "comment": "", "split": "dev"}
    return {"index": index, "question": "Which?", **texts, "answer": answer, "image": image, **base, **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Question 5 in two rotations and question 9, with a hint and another category, in three."""
    rows = [
        question(5, "red,banana", "A"),
        question(9, "cat,dog,cow", "B", BLUE, hint='He said "moo".\nTwice.', category="animal"),
        question(1_000_005, "banana,red", "B"),
        question(1_000_009, "dog,cow,cat", "A", BLUE, category="animal"),
        question(2_000_009, "cow,cat,dog", "C", BLUE, category="animal"),
    ]
    write_tsv(tmp_path / "mmbench/mmbench_dev_20230712.tsv", rows)
    return tmp_path


RIGHT = {5: "A", 9: "B", 1_000_005: "B", 1_000_009: "A", 2_000_009: "C"}


def test_every_row_is_asked_once_with_hint_and_present_options(root: Path) -> None:
    items = MMBench().load(root)
    assert [item.question_id for item in items] == [5, 9, 1_000_005, 1_000_009, 2_000_009]
    assert items[0].prompt == f"Which?\nA. red\nB. banana\n{SUFFIX}"
    assert items[1].prompt == f'He said "moo".\nTwice.\nWhich?\nA. cat\nB. dog\nC. cow\n{SUFFIX}'
    assert [item.options for item in items] == [2, 3, 2, 3, 3]
    assert MMBench().load(root / "mmbench") == items == MMBench().load(root / "mmbench/mmbench_dev_20230712.tsv")


def test_images_are_decoded_from_base64_and_shared_by_rotations(root: Path) -> None:
    items = MMBench().load(root)
    assert open_image_ref(items[1].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert items[0].images[0].key == items[2].images[0].key != items[1].images[0].key


def test_an_image_cell_may_be_the_index_of_an_earlier_row(root: Path) -> None:
    rows = [question(5, "red,blue", "A"), question(1_000_005, "blue,red", "B", "5")]
    items = MMBench().load(write_tsv(root / "mmbench/x.tsv", rows))
    assert items[1].images == items[0].images


def test_a_question_counts_only_if_every_rotation_is_right(root: Path) -> None:
    items = MMBench().load(root)
    assert scored(MMBench(), items, RIGHT).aggregate == {
        "accuracy": 100.0,
        "category/color": 100.0,
        "category/animal": 100.0,
        "l2/perception": 100.0,
    }
    one_wrong = scored(MMBench(), items, RIGHT | {1_000_005: "A"})
    assert one_wrong.aggregate == {
        "accuracy": 50.0,
        "category/color": 0.0,
        "category/animal": 100.0,
        "l2/perception": 50.0,
    }
    assert [row.score for row in one_wrong.per_item] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert one_wrong.counts["questions"] == 2
    vanilla = scored(MMBench(), items, RIGHT | {1_000_005: "A"}, "vanilla")
    assert vanilla.aggregate["accuracy"] == 100.0
    assert [row.score for row in vanilla.per_item] == [1.0, 1.0, None, None, None]


def test_an_unread_or_missing_row_loses_its_question_and_is_counted(root: Path) -> None:
    items = MMBench().load(root)
    texts = {**RIGHT, 5: "b"}
    del texts[2_000_009]
    scores = scored(MMBench(), items, texts)
    assert scores.aggregate["accuracy"] == 0.0
    assert (scores.counts["unparsed"], scores.counts["missing"], scores.counts["guessed"]) == (1, 1, 0)
    assert scored(MMBench(), items, {}).aggregate["accuracy"] == 0.0


def test_lmms_takes_absent_options_for_the_text_nan(root: Path) -> None:
    items = MMBench().load(root)
    # "banana" contains "nan", so C and D are named as well and nothing can be read
    assert by_id(scored(MMBench(), items, RIGHT | {5: "a banana"}, "lmms"))["5"] == (0.0, None)
    assert by_id(scored(MMBench(), items, RIGHT | {5: "a banana"}))["5"] == (0.0, "B")
    assert by_id(scored(MMBench(), items, RIGHT | {5: "it is red"}, "lmms"))["5"] == (1.0, "A")


def test_the_judge_matches_what_rules_cannot_read_unless_the_question_is_lost_anyway(
    root: Path,
) -> None:
    items = MMBench().load(root)
    texts = RIGHT | {5: "the colour of blood", 1_000_009: "woof", 2_000_009: "A"}  # 9 is lost by its last row
    with judge_server(lambda body: completion("A")) as server:
        scores = scored(MMBench(), items, texts, judge=Judge(server.url, "gpt-3.5-turbo-0613"))
    assert scores.aggregate["accuracy"] == 50.0
    assert by_id(scores)["5"] == (1.0, "A")
    assert by_id(scores)["1000009"] == (0.0, None)
    assert (scores.counts["judged"], scores.counts["judge_requests"], scores.counts["guessed"]) == (1, 1, 0)
    (body,) = server.bodies
    asked = body["messages"][0]["content"]
    assert asked.endswith(
        "Example 3: \nQuestion: Which?\nOptions: There are several options: \nA. red\nB. banana\n\n"
        "Answer: the colour of blood\nYour output: "
    )
    assert "output Z" in asked


def test_three_useless_replies_end_in_a_counted_guess(root: Path) -> None:
    items = MMBench().load(root)
    with judge_server(lambda body: completion("I cannot say")) as server:
        scores = scored(MMBench(), items, RIGHT | {5: "dunno"}, judge=Judge(server.url, "m"))
        again = scored(MMBench(), items, RIGHT | {5: "dunno"}, judge=Judge(server.url, "m"))
    assert len(server.requests) == 6
    assert (scores.counts["guessed"], scores.counts["unparsed"]) == (1, 1)
    assert scores.aggregate == again.aggregate
    with judge_server(lambda body: completion("Z")) as server:
        none = scored(MMBench(), items, RIGHT | {5: "dunno"}, judge=Judge(server.url, "m"))
    assert by_id(none)["5"] == (0.0, "Z") and none.counts["guessed"] == 0


def test_of_all_rounds_only_the_first_counts(root: Path) -> None:
    items = MMBench().load(root)
    rows = [{"question_id": 5, "round_id": 0, "text": "A"}, {"question_id": 5, "round_id": 1, "text": "B"}]
    assert MMBench().pair(items, rows)["5"].text == "A"


def test_the_upload_has_the_columns_of_llavas_converter(root: Path, tmp_path: Path) -> None:
    items = MMBench().load(root)
    texts = {**RIGHT, 5: "=1+1", 9: "a\x07b"}
    del texts[1_000_005]
    MMBench().write_submission(items, given(texts), tmp_path / "upload.xlsx")
    sheet = load_workbook(tmp_path / "upload.xlsx").active
    table = [list(row) for row in sheet.iter_rows(values_only=True)]
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[1] == [5, "Which?", "red", "banana", None, None, "=1+1", "A", "dev"]
    assert sheet["G2"].data_type == "s"  # text, no formula
    assert table[2] == [9, "Which?", "cat", "dog", "cow", None, "ab", "B", "dev"]
    assert table[3][6] is None
    assert len(table) == 6


def test_the_test_split_can_only_be_uploaded(tmp_path: Path) -> None:
    rows = [question(5, "red,blue", "", split="test")]
    write_tsv(tmp_path / "mmbench/mmbench_test_20230712.tsv", rows)
    items = MMBench(split="test").load(tmp_path)
    scores = scored(MMBench(), items, {5: "A"})
    assert scores.aggregate == {} and by_id(scores)["5"] == (None, "A")
    MMBench().write_submission(items, given({5: "A"}), tmp_path / "upload.xlsx")
    header = next(load_workbook(tmp_path / "upload.xlsx").active.iter_rows(values_only=True))
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "split")


def test_chinese_questions_end_in_a_chinese_suffix(root: Path) -> None:
    write_tsv(root / "mmbench/mmbench_dev_cn_20231003.tsv", [question(5, "红,蓝", "A")])
    assert MMBench(split="dev_cn").load(root)[0].prompt == "Which?\nA. 红\nB. 蓝\n请直接回答选项字母。"
    assert len(MMBench().load(root)) == 5  # English is the default
    (root / "mmbench/mmbench_dev_20230712.tsv").unlink()
    assert len(MMBench().load(root)) == 1
    with pytest.raises(ConfigError, match=r"no split 'cn'.*dev_cn"):
        MMBench(split="cn")


def test_parquet_spells_absent_options_nan_and_its_columns_otherwise(tmp_path: Path) -> None:
    row = {"index": 5, "question": "Which?", "hint": "nan", "A": "red", "B": "banana", "C": "nan", "D": "nan"}
    row |= {"answer": "A", "category": "color", "image": cell(png()), "L2-category": "perception", "split": "dev"}
    rotated = row | {"index": 1_000_005, "A": "banana", "B": "red", "answer": "B"}
    write_parquet(tmp_path / "en/dev-00000-of-00001.parquet", [row, rotated])
    items = MMBench().load(tmp_path, "hf")
    assert items[0].prompt == f"Which?\nA. red\nB. banana\n{SUFFIX}"
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    assert items[1].images == items[0].images  # the tower runs once a question
    assert scored(MMBench(), items, {5: "A", 1_000_005: "B"}).aggregate["l2/perception"] == 100.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "no base64!"}, "row 1: column image is no base64"),
        ({"image": ""}, "row 1: column image is empty"),
        ({"index": "five"}, "row 1: index 'five' is no number"),
        ({"answer": "D"}, r"row 1: answer 'D' is no option \(A, B\)"),
    ],
)
def test_a_broken_row_is_named(root: Path, change: dict[str, str], message: str) -> None:
    path = write_tsv(root / "x.tsv", [question(5, "red,blue", "A") | change])
    with pytest.raises(DataError, match=message):
        MMBench().load(path)


def test_a_file_without_the_columns_is_no_mmbench(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("index\tquestion\n1\twhat?\n")
    with pytest.raises(DataError, match="column A, B, image missing; it has index, question"):
        MMBench().load(tmp_path / "x.tsv")
    with pytest.raises(DataError, match=r"mmbench_dev_20230712.tsv not found.*download.openmmlab.com"):
        MMBench().load(tmp_path)


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "none", "None", "NA", "N/A", "null"])
def test_options_end_at_whatever_pandas_takes_for_no_value(tmp_path: Path, empty: str) -> None:
    path = write_tsv(tmp_path / "x.tsv", [question(5, f"red,blue,{empty},green", "A")])
    assert MMBench().load(path)[0].options == 2
