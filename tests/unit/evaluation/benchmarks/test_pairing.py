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


def test_without_prompts_only_an_id_of_its_own_tells_a_question() -> None:
    items = (Item("a", "a", "one", other_ids=("7",)), Item("a#2", "a", "two", other_ids=("8",)), Item("b", "b", "one"))
    rows = [{"question_id": 8, "text": "2"}, {"question_id": "b", "text": "3"}, {"question_id": "7", "text": "1"}]
    paired = pair_by_prompt(items, rows, question_in)
    assert {name: answer.text for name, answer in paired.items()} == {"a": "1", "a#2": "2", "b": "3"}
    for order in ("12", "21"):  # as many answers as questions say nothing of their order
        rows = [{"question_id": "a", "text": text} for text in order]
        with pytest.raises(DataError, match="2 questions share this id, so the answer needs the `prompt`"):
            pair_by_prompt(items, rows, question_in)


def test_an_id_and_a_prompt_that_disagree_are_refused() -> None:
    items = (Item("a", "a", "one", other_ids=("7",)), Item("a#2", "a", "two", other_ids=("8",)))
    with pytest.raises(DataError, match="question_id 7: none of its 1 questions is the one in the prompt, 'two'"):
        pair_by_prompt(items, [{"question_id": 7, "text": "x", "prompt": "two"}], question_in)
