"""Scoring of the digits benchmark, by hand-checkable cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.digits import Digits, is_correct
from tinylmm.evaluation.benchmarks.records import Answer, ImageRef, Item
from tinylmm.evaluation.images import open_image_ref
from tinylmm.evaluation.score_rows import score_rows

ROW = {"question_id": "1", "image": "a.png", "text": "what?", "category": "digit", "answer": "3", "options": 10}


def item(number: int, category: str, answer: str, options: int) -> Item:
    image = ImageRef(Path(f"{number}.png"))
    return Item(str(number), str(number), "what?", (image,), category, answer, options)


def said(*texts: str) -> dict[str, Answer]:
    return {str(number): Answer(text) for number, text in enumerate(texts, 1)}


ITEMS = [item(1, "digit", "3", 10), item(2, "digit", "4", 10), item(3, "yesno", "yes", 2)]


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("3", "3", True),
        (" 3.\n", "3", True),
        ("Red", "red", True),
        ("33", "3", False),
        ("", "3", False),
        (".", "", False),
    ],
)
def test_exact_match_ignores_case_space_and_a_final_stop(text: str, truth: str, expected: bool) -> None:
    assert is_correct(text, truth) is expected


def test_scores_are_percentages_per_category_beside_blind_and_chance() -> None:
    answers, digits = said("3", "9", "Yes."), Digits()
    scores = digits.score(ITEMS, answers)
    blind = digits.score(ITEMS, said("7", "4", "yes"))
    rows = score_rows(digits, ITEMS, answers, scores, blind)
    assert [{key: row[key] for key in ("metric", "value", "blind", "chance", "count")} for row in rows] == [
        {"metric": "accuracy", "value": 66.6667, "blind": 66.6667, "chance": 23.3333, "count": 3},
        {"metric": "accuracy/digit", "value": 50.0, "blind": 50.0, "chance": 10.0, "count": 2},
        {"metric": "accuracy/yesno", "value": 100.0, "blind": 100.0, "chance": 50.0, "count": 1},
    ]
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)
    assert scores.counts == {"scored": 3, "missing": 0, "unparsed": 0}
    assert [(row.item_id, row.score, row.parsed) for row in scores.per_item] == [
        ("1", 1.0, "3"),
        ("2", 0.0, "9"),
        ("3", 1.0, "yes"),
    ]


def test_without_blind_answers_there_is_no_blind_score() -> None:
    answers, digits = said("3"), Digits()
    assert score_rows(digits, ITEMS[:1], answers, digits.score(ITEMS[:1], answers), None)[0]["blind"] is None


def test_no_questions_give_no_metrics_and_missing_answers_are_wrong() -> None:
    digits = Digits()
    assert digits.score([], {}).aggregate == {}
    nothing = digits.score(ITEMS, {})
    assert nothing.aggregate["accuracy"] == 0 and nothing.counts["missing"] == 3
    with pytest.raises(ConfigError, match="lenient"):
        digits.score(ITEMS, {}, "lenient")


def test_questions_are_read_with_their_images_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "images/a.png")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    (read,) = Digits().load(tmp_path)
    assert (read.prompt, read.reference, read.options) == ("what?", "3", 10)
    assert open_image_ref(read.images[0]).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "test.jsonl").write_text(json.dumps({**ROW, "image": "../test.jsonl"}) + "\n")
    with pytest.raises(DataError, match="must be a path inside"):
        Digits().load(tmp_path)
    with pytest.raises(DataError, match="leads out of the image folder"):
        Digits().load_source(tmp_path / "test.jsonl", tmp_path / "images")


def test_a_broken_question_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n{not json}\n")
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: not valid JSON"):
        Digits().load(tmp_path)
    path.write_text('{"question_id": "1"}\n')
    with pytest.raises(DataError, match="line 1: field text, category, answer, options missing"):
        Digits().load(tmp_path)
