"""What benchmarks are made of."""

from __future__ import annotations

import json

from tinylmm.evaluation.benchmarks.records import Item, ItemScore, Scores


def test_the_json_has_the_question_files_own_ids() -> None:
    items = [Item("a", "a", "?"), Item("a#2", "a", "?")]
    scores = Scores("x", "v", {"accuracy": 50.0}, (ItemScore("a", 1.0, "y"), ItemScore("a#2", 0.0)), {"scored": 2})
    assert [row["id"] for row in scores.as_json(items)["per_item"]] == ["a", "a"]
    assert [row["id"] for row in scores.as_json()["per_item"]] == ["a", "a#2"]
    assert json.loads(json.dumps(scores.as_json(items)))["aggregate"] == {"accuracy": 50.0}
