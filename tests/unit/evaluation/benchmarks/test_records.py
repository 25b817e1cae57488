"""What benchmarks are made of."""

from __future__ import annotations

import json

import pytest

from tinylmm.evaluation.benchmarks.free_text import FreeTextReference
from tinylmm.evaluation.benchmarks.llava_bench import LLaVABench
from tinylmm.evaluation.benchmarks.records import Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.textvqa import TextVQA
from tinylmm.evaluation.benchmarks.vizwiz import VizWiz
from tinylmm.evaluation.benchmarks.vqav2 import VQAv2


def test_the_json_has_the_question_files_own_ids() -> None:
    items = [Item("a", "a", "?"), Item("a#2", "a", "?")]
    scores = Scores("x", "v", {"accuracy": 50.0}, (ItemScore("a", 1.0, "y"), ItemScore("a#2", 0.0)), {"scored": 2})
    assert [row["id"] for row in scores.as_json(items)["per_item"]] == ["a", "a"]
    assert [row["id"] for row in scores.as_json()["per_item"]] == ["a", "a#2"]
    assert json.loads(json.dumps(scores.as_json(items)))["aggregate"] == {"accuracy": 50.0}


class Kept:
    """A reference of a class that does not say how it is shown."""


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (FreeTextReference(("red",) * 8 + ("dark red",) * 2), "red (8), dark red (2)"),
        (FreeTextReference(("yes",) * 10), "yes"),
        (FreeTextReference(), ""),
        ({"answer": "B"}, "B"),
        ({"gold": "B"}, ""),
        (["a", "b"], "a, b"),
        (3, "3"),
        (None, ""),
        (Kept(), ""),
    ],
    ids=["annotators", "agreed", "hidden", "mapping", "no answer", "list", "number", "none", "class"],
)
def test_the_right_answer_is_shown_in_words_and_never_as_pythons_repr(reference: object, words: str) -> None:
    for benchmark in (VQAv2(), TextVQA(), VizWiz()):
        assert benchmark.truth(Item("1", 1, "?", reference=reference)) == words


def test_a_rating_is_neither_right_nor_wrong() -> None:
    assert [LLaVABench().correct(score) for score in (3.0, 9.0, None)] == [None, None, None]
    assert [VQAv2().correct(score) for score in (0.3, 0.6, None)] == [False, True, None]
