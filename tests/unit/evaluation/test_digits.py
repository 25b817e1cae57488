"""Scoring of the digits benchmark, by hand-checkable cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.errors import DataError
from tinylmm.evaluation.digits import Answered, generation_row, is_correct, score
from tinylmm.evaluation.questions import Question, read_questions


def question(number: int, category: str, answer: str, options: int) -> Question:
    return Question(str(number), "a.png", "what?", category, answer, options)


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
    asked = [
        Answered(question(1, "digit", "3", 10), "3", "7"),
        Answered(question(2, "digit", "4", 10), "9", "4"),
        Answered(question(3, "yesno", "yes", 2), "yes", "yes"),
    ]
    assert score([generation_row(a) for a in asked]) == [
        {"metric": "accuracy", "value": 66.6667, "blind": 66.6667, "chance": 23.3333, "count": 3},
        {"metric": "accuracy/digit", "value": 50.0, "blind": 50.0, "chance": 10.0, "count": 2},
        {"metric": "accuracy/yesno", "value": 100.0, "blind": 100.0, "chance": 50.0, "count": 1},
    ]


def test_without_blind_answers_there_is_no_blind_score() -> None:
    rows = [generation_row(Answered(question(1, "digit", "3", 10), "3", None))]
    assert score(rows)[0]["blind"] is None


def test_no_answers_give_no_scores() -> None:
    assert score([]) == []


def test_a_broken_question_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question(1, "digit", "3", 10).__dict__) + "\n{not json}\n")
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: not JSON"):
        read_questions(path)
    path.write_text('{"question_id": "1"}\n')
    with pytest.raises(DataError, match="line 1: field image, text, category, answer, options missing"):
        read_questions(path)
