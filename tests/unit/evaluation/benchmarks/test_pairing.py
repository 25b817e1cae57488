"""Pairing of answers with items, by content."""

from __future__ import annotations

import pytest

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.pairing import pair_by_prompt, pair_by_question_id, unique_ids
from tinylmm.evaluation.benchmarks.prompts import question_in
from tinylmm.evaluation.benchmarks.records import Item

ITEMS = (Item("1", 1, "a"), Item("2", 2, "b"))


def test_ids_match_as_text_and_the_last_answer_counts() -> None:
    rows = [{"question_id": "2", "text": "x"}, {"question_id": 1, "text": "y"}, {"question_id": 2, "text": "z"}]
    paired = pair_by_question_id(ITEMS, rows)
    assert {name: answer.text for name, answer in paired.items()} == {"1": "y", "2": "z"}


def test_an_answer_to_no_question_is_refused() -> None:
    with pytest.raises(DataError, match="answer 1, question_id 3: no such question among the 2"):
        pair_by_question_id(ITEMS, [{"question_id": 3, "text": "x"}])


def test_repeated_ids_get_a_suffix() -> None:
    assert unique_ids(["a", "b", "a", 3, "a"]) == ["a", "b", "a#2", "3", "a#3"]


def test_a_prompt_decides_between_questions_of_one_id() -> None:
    items = (Item("a", "a", "one"), Item("a#2", "a", "two"), Item("b", "b", "one"))
    rows = [
        {"question_id": "b", "text": "3"},
        {"question_id": "a", "text": "2", "prompt": "two"},
        {"question_id": "a", "text": "1", "prompt": "<image>\none"},
    ]
    paired = pair_by_prompt(items, rows, question_in)
    assert {name: answer.text for name, answer in paired.items()} == {"a": "1", "a#2": "2", "b": "3"}
    with pytest.raises(DataError, match="none of its 2 questions"):
        pair_by_prompt(items, [{"question_id": "a", "text": "1", "prompt": "three"}], question_in)


def test_without_prompts_an_id_must_be_answered_as_often_as_it_is_asked() -> None:
    items = (Item("a", "a", "one"), Item("a#2", "a", "two"))
    rows = [{"question_id": "a", "text": "1"}, {"question_id": "a", "text": "2"}]
    assert pair_by_prompt(items, rows, question_in)["a#2"].text == "2"
    with pytest.raises(DataError, match="2 questions share this id, so the answer needs the `prompt`"):
        pair_by_prompt(items, rows[:1], question_in)
