"""ScienceQA: LLaVA's file layout and parquet, and every rule of its three scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import by_id, cell, png, scored, write_image, write_json, write_parquet
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.sqa import SQA, parse_llava, parse_lmms
from tinylmm.evaluation.images import open_image_ref

SUFFIX = "Answer with the option's letter from the given choices directly."


def record(pid: str, question: str, letter: str, image: bool = False) -> dict[str, Any]:
    value = ("<image>\n" if image else "") + question
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": letter}]
    return {"id": pid, "conversations": turns} | ({"image": f"{pid}/image.png"} if image else {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four questions as LLaVA's eval.zip spells them: 4 and 12 have an image, 12 a hint."""
    folder = tmp_path / "scienceqa"
    write_json(
        folder / "llava_test_CQM-A.json",
        [
            record("4", "Which is bigger?\nA. sun\nB. moon", "A", image=True),
            record("7", "Which is wet?\nA. sand\nB. water\nC. rock", "B"),
            record("12", "Context: Look at it.\nWhat is it?\nA. cat\nB. dog", "B", image=True),
            record("20", "Which one?\nA. x\nB. y\nC. z", "C"),
        ],
    )
    problem = {"hint": "", "subject": "natural science"}
    write_json(
        folder / "problems.json",
        {
            "4": {"choices": ["sun", "moon"], "answer": 0, **problem},
            "7": {"choices": ["sand", "water", "rock"], "answer": 1, **problem},
            "12": {"choices": ["cat", "dog"], "answer": 1, **problem, "subject": "language science"},
            "20": {"choices": ["x", "y", "z"], "answer": 2, **problem},
        },
    )
    write_json(folder / "pid_splits.json", {"train": ["1"], "test": ["4", "7", "12", "20"]})
    write_image(folder / "images/test/12/image.png")
    return tmp_path


def test_items_come_in_file_order_with_the_prompt_of_the_script(root: Path) -> None:
    items = SQA().load(root)
    assert [item.item_id for item in items] == ["4", "7", "12", "20"]
    assert items[0].prompt == f"Which is bigger?\nA. sun\nB. moon\n{SUFFIX}"
    assert items[2].prompt == f"Context: Look at it.\nWhat is it?\nA. cat\nB. dog\n{SUFFIX}"
    assert [len(item.images) for item in items] == [1, 0, 1, 0]
    assert open_image_ref(items[2].images[0]).size == (4, 3)
    assert [item.options for item in items] == [2, 3, 2, 3]
    # the benchmark's own folder is as good a root as the one around it
    assert SQA().load(root / "scienceqa") == items


def test_accuracy_over_all_and_over_questions_with_an_image(root: Path) -> None:
    items = SQA().load(root)
    scores = scored(SQA(), items, {"4": "A", "7": "B. water", "12": "A", "20": "The answer is C."})
    assert scores.aggregate == {
        "img_accuracy": 50.0,
        "accuracy": 75.0,
        "subject/natural science": 100.0,
        "subject/language science": 0.0,
    }
    assert next(iter(scores.aggregate)) == SQA.headline
    assert scores.variant == "llava"
    assert scores.counts == {"scored": 4, "missing": 0, "unparsed": 0}


def test_unread_missing_and_impossible_letters_are_wrong_and_counted(root: Path) -> None:
    items = SQA().load(root)
    scores = scored(SQA(), items, {4: "(A)", 12: "C", 20: ""})  # ids may be numbers; C is no choice of 12
    assert by_id(scores) == {"4": (0.0, None), "7": (0.0, None), "12": (0.0, None), "20": (0.0, None)}
    assert scores.counts == {"scored": 3, "missing": 1, "unparsed": 3}
    assert scored(SQA(), items, {}).aggregate["img_accuracy"] == 0.0


def test_variants_disagree_on_what_is_no_bare_letter(root: Path) -> None:
    items = SQA().load(root)
    texts = {"4": "a", "7": "B.", "12": "It is a dog", "20": "The answer is C."}
    assert [row.score for row in scored(SQA(), items, texts).per_item] == [0.0, 0.0, 0.0, 1.0]
    assert [row.score for row in scored(SQA(), items, texts, "lmms").per_item] == [1.0, 1.0, 0.0, 0.0]
    assert [row.score for row in scored(SQA(), items, texts, "vlmeval").per_item] == [0.0, 1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"'lmm' is unknown. Did you mean 'lmms'.*sqa has llava, lmms, vlmeval"):
        scored(SQA(), items, texts, "lmm")


@pytest.mark.parametrize(
    ("text", "llava", "lmms"),
    [
        ("B", "B", "B"),
        ("B. because", "B", "B"),
        ("B.because", None, "B"),
        ("B.", None, "B"),
        ("b", None, "B"),
        (" B", None, "B"),
        ("B\n", None, "B"),
        ("(B)", None, None),
        ("B) x", None, None),
        ("F", None, "F"),  # LLaVA knows five options
        ("The answer is B.", "B", None),
        ("The answer is B", None, None),  # one more character is needed,
        ("The answer is B!", "B", None),  # any,
        ("The answer is B\n", None, None),  # but no line break
        ("The answer is A. No, The answer is B.", None, None),  # exactly one
        ("the answer is B.", None, None),
        ("", None, None),
    ],
)
def test_parsers(text: str, llava: str | None, lmms: str | None) -> None:
    assert parse_llava(text) == llava
    assert parse_lmms(text) == lmms


def test_without_problems_the_answer_turn_tells_the_letter(root: Path) -> None:
    (root / "scienceqa/problems.json").unlink()
    scores = scored(SQA(), SQA().load(root), {"4": "A", "7": "B", "12": "B", "20": "C"})
    assert scores.aggregate == {"img_accuracy": 100.0, "accuracy": 100.0}


def test_questions_outside_the_test_split_take_no_part(root: Path) -> None:
    write_json(root / "scienceqa/pid_splits.json", {"test": ["4", "7"]})
    scores = scored(SQA(), SQA().load(root), {"4": "A", "7": "A", "12": "B", "20": "C"})
    assert scores.aggregate["accuracy"] == 50.0
    assert [row.score for row in scores.per_item] == [1.0, 0.0, None, None]


def test_parquet_rows_are_asked_in_the_same_words(tmp_path: Path) -> None:
    row = {"question": "What is it?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look at it.", "subject": "s"}
    rows = [row | {"image": cell(png())}, row | {"image": None, "hint": ""}]
    write_parquet(tmp_path / "ScienceQA-FULL/test-00000-of-00001.parquet", rows)
    items = SQA().load(tmp_path, "hf")
    assert items[0].prompt == f"Context: Look at it.\nWhat is it?\nA. cat\nB. dog\n{SUFFIX}"
    assert items[1].prompt == f"What is it?\nA. cat\nB. dog\n{SUFFIX}"
    assert [len(item.images) for item in items] == [1, 0]
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    assert scored(SQA(), items, {0: "B", 1: "A"}).aggregate["img_accuracy"] == 100.0


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"llava_test_CQM-A.json not found; looked for .*eval\.zip"):
        SQA().load(tmp_path)


def test_a_broken_record_is_named(root: Path) -> None:
    write_json(root / "scienceqa/llava_test_CQM-A.json", [{"id": "4", "conversations": []}])
    with pytest.raises(DataError, match=r"llava_test_CQM-A.json, record 1: `conversations` must list turns"):
        SQA().load(root)


@pytest.mark.parametrize(
    "problem", [{"choices": ["x"], "answer": 1}, {"choices": "xy", "answer": 0}, {"choices": ["x"], "answer": "A"}]
)
def test_an_answer_that_is_no_choice_is_named(root: Path, problem: dict[str, Any]) -> None:
    write_json(root / "scienceqa/problems.json", {"4": problem})
    with pytest.raises(DataError, match=r"problems.json, problem 4: answer .* is no index into choices"):
        SQA().load(root)
