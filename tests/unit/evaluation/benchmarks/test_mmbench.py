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
from tinylmm.config.spec import EvalSpec
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.files import read_answer_file
from tinylmm.evaluation.benchmarks.mmbench import MMBench
from tinylmm.evaluation.benchmarks.spreadsheet import write_sheet
from tinylmm.evaluation.images import content_keys, open_image_ref
from tinylmm.evaluation.judge import Judge
from tinylmm.planning.fingerprints import benchmark_fingerprint

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


@pytest.mark.parametrize("named", ["5", "1000"])  # "1000" is base64 of three bytes, too
@pytest.mark.parametrize("forward", [False, True])
def test_an_image_cell_may_be_the_index_of_any_other_row(root: Path, named: str, forward: bool) -> None:
    rows = [question(int(named), "red,blue", "A"), question(1_000_005, "blue,red", "B", named)]
    items = MMBench().load(write_tsv(root / "mmbench/x.tsv", rows[::-1] if forward else rows))
    assert items[1].images == items[0].images
    assert open_image_ref(items[0].images[0]).getpixel((0, 0)) == (200, 30, 30)


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("", "column image is empty"),
        ("no base64!", "'no base64!', which is neither base64 nor the index of a row"),
        ("1000!", "neither base64 nor the index"),
        (RED + "!", "column image is no base64"),
        ("A" * 32_767, "ends after 32,767 characters, as spreadsheet programs cut a cell off"),
    ],
)
def test_scoring_needs_no_image_and_opening_a_bad_one_names_it(root: Path, cell: str, fault: str) -> None:
    path = write_tsv(root / "x.tsv", [question(5, "red,blue", "A", cell), question(6, "red,blue", "B", BLUE)])
    items = MMBench().load(path)
    assert scored(MMBench(), items, {5: "A", 6: "A"}).aggregate["accuracy"] == 50.0
    with pytest.raises(DataError, match=rf"x\.tsv, row 1: .*{fault}.*Fetch the file again"):
        open_image_ref(items[0].images[0])
    keys = content_keys(items)
    assert len(set(keys.values())) == 2


def test_a_plan_counts_images_that_a_table_lacks_as_missing(root: Path, tmp_path: Path) -> None:
    write_tsv(root / "mmbench/mmbench_dev_20230712.tsv", [question(5, "red,blue", "A", ""), question(6, "a,b", "A")])
    spec = EvalSpec(benchmark="mmbench", root=str(root), max_new_tokens=8)
    found = benchmark_fingerprint(MMBench(), spec, tmp_path / "cache")
    assert (found["num_missing"], found["missing"]) == (1, ["mmbench/mmbench_dev_20230712.tsv#1.image"])


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
        "Example 3: \nQuestion: Which??\nOptions: There are several options: \nA. red\nB. banana\n\n"
        "Answer: the colour of blood\nYour output: "
    )
    assert "output Z" in asked


def test_the_judge_is_asked_in_chinese_about_a_chinese_question_by_vlmevalkit_only(root: Path) -> None:
    path = write_tsv(root / "x.tsv", [question(5, "红,蓝", "A", question="哪个")])
    items = MMBench().load(path)
    with judge_server(lambda body: completion("A")) as server:
        scored(MMBench(), items, {5: "dunno"}, judge=Judge(server.url, "m"))
        scored(MMBench(), items, {5: "dunno"}, "lmms", judge=Judge(server.url, "m"))
    official, lmms = (body["messages"][0]["content"] for body in server.bodies)
    assert official.startswith("你是一个") and official.endswith("A. 红\nB. 蓝\n\n答案: dunno\n输出: ")
    assert "问题: 哪个?\n选项: There are several options" in official and "则输出 Z" in official
    assert lmms.startswith("You are an AI assistant") and "Question: 哪个?\nOptions" in lmms


def test_lmms_reads_with_a_second_extractor_where_no_judge_is_named(root: Path) -> None:
    items = MMBench().load(root)
    texts = RIGHT | {5: "My choice is A- blood is like that"}  # in none of the twelve spellings
    assert scored(MMBench(), items, texts, "lmms").aggregate["accuracy"] == 100.0
    with judge_server(lambda body: completion("B")) as server:
        judged = scored(MMBench(), items, texts, "lmms", judge=Judge(server.url, "m"))
    assert judged.aggregate["accuracy"] == 50.0 and len(server.requests) == 1


def test_a_refusal_is_read_and_wrong_so_that_no_judge_is_asked(root: Path) -> None:
    items = MMBench().load(root)
    with judge_server(lambda body: completion("A")) as server:
        refused = "I'm sorry, but without the image provided I cannot tell"
        scores = scored(MMBench(), items, RIGHT | {5: refused}, judge=Judge(server.url, "m"))
    assert by_id(scores)["5"] == (0.0, "Z") and not server.requests


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


V11 = ["MMBench_DEV_EN_V11.tsv", "MMBench_DEV_CN_V11.tsv", "MMBench_TEST_EN_V11.tsv", "MMBench_TEST_CN_V11.tsv"]


@pytest.mark.parametrize(("name", "split"), zip(V11, ["dev_v11", "dev_cn_v11", "test_v11", "test_cn_v11"], strict=True))
def test_version_1_1_is_found_by_its_names_and_is_splits_of_its_own(tmp_path: Path, name: str, split: str) -> None:
    answer = "" if "TEST" in name else "A"
    path = write_tsv(tmp_path / "mmbench" / name, [question(5, "red,blue", answer)])
    for root in (tmp_path, path):
        assert MMBench().chosen_split(root) == split
        assert MMBench().load(root)[0].prompt.endswith("请直接回答选项字母。" if "CN" in name else SUFFIX)
    write_tsv(tmp_path / "mmbench/mmbench_dev_20230712.tsv", [question(7, "red,blue", "A")])
    assert MMBench().load(tmp_path)[0].item_id == "7"  # what papers report comes first
    assert MMBench(split).load(tmp_path)[0].item_id == "5"
    with pytest.raises(ConfigError, match=f"{split} is read from its TSV, {name}, only"):
        MMBench(split).load(tmp_path, "hf")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("my_mmbench_test_cn.tsv", "test_cn"),
        ("MMBench_V11.tsv", "dev_v11"),
        ("x.tsv", "dev"),
        ("MMBench_TEST_EN.tsv", "test"),
    ],
)
def test_the_name_of_a_table_tells_its_split(tmp_path: Path, name: str, split: str) -> None:
    assert MMBench().chosen_split(write_tsv(tmp_path / name, [])) == split


def test_vlmevalkits_workbook_is_scored(root: Path, tmp_path: Path) -> None:
    items = MMBench().load(root)
    questions = {item.question_id: item.reference["question"] for item in items}
    table = [[index, questions[index], "x", letter] for index, letter in RIGHT.items()]
    write_sheet(tmp_path / "model_MMBench.xlsx", ["index", "question", "A", "prediction"], table)
    rows = read_answer_file(tmp_path / "model_MMBench.xlsx")
    assert MMBench().score(items, MMBench().pair(items, rows)).aggregate["accuracy"] == 100.0
    table[1][1] = "Where?"
    write_sheet(tmp_path / "other.xlsx", ["index", "question", "A", "prediction"], table)
    with pytest.raises(
        DataError, match=r"index 9 is about 'Where\?' in the answer file and about 'Which\?'.*two versions"
    ):
        MMBench().pair(items, read_answer_file(tmp_path / "other.xlsx"))


def test_an_index_may_have_become_a_decimal_and_may_not_occur_twice(root: Path) -> None:
    rows = [question(5, "red,blue", "A") | {"index": "5.0"}, question(6, "red,blue", "A")]
    assert [item.question_id for item in MMBench().load(write_tsv(root / "x.tsv", rows))] == [5, 6]
    with pytest.raises(DataError, match=r"x\.tsv: 1 indices occur twice, 5 first"):
        MMBench().load(write_tsv(root / "x.tsv", [rows[0], question(5, "red,blue", "A")]))


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
        ({"index": "five"}, "row 1: index 'five' is no number"),
        ({"index": "1.5"}, "row 1: index '1.5' is no number"),
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
