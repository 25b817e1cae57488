"""Rows of scores.json: the headline first, each metric with the interval that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.score_rows import score_rows


class Paired(Benchmark):
    """Yes or no, in pairs about one image, as MME counts: points are accuracy plus the share of images with both right."""

    name: ClassVar[str] = "paired"
    variants: ClassVar[tuple[str, ...]] = ("plain",)
    headline: ClassVar[str] = "points"
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        refs = [ImageRef(root / f"{n // 2}.png") for n in range(80)]
        return [
            Item(str(n), n, "?", (ref,), "left" if n < 40 else "right", "yes", options=2) for n, ref in enumerate(refs)
        ]

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], variant: str | None = None, judge: object = None
    ) -> Scores:
        rows = tuple(ItemScore(item.item_id, float(answers[item.item_id].text == "yes")) for item in items)
        both: dict[str, bool] = {}
        for item, row in zip(items, rows, strict=True):
            both[item.images[0].key] = both.get(item.images[0].key, True) and row.score == 1.0
        accuracy = 100 * sum(row.score or 0 for row in rows) / len(rows)
        left = [row.score or 0 for item, row in zip(items, rows, strict=True) if item.category == "left"]
        figures = {"accuracy": round(accuracy, 2), "accuracy/left": round(100 * sum(left) / max(len(left), 1), 2)}
        points = accuracy + 100 * sum(both.values()) / len(both)
        return Scores(self.name, "plain", {**figures, "points": round(points, 2)}, rows, {"scored": len(rows)})


def rows_for(said: Sequence[str]) -> dict[str, dict[str, object]]:
    benchmark = Paired()
    items = benchmark.load(Path("images"))
    answers = {item.item_id: Answer(text) for item, text in zip(items, said, strict=True)}
    rows = score_rows(benchmark, items, answers, benchmark.score(items, answers), None)
    assert [row["metric"] for row in rows] == ["points", "accuracy", "accuracy/left"]
    return {str(row["metric"]): row for row in rows}


def test_a_mean_over_questions_is_bootstrapped_and_any_other_metric_scored_on_halves() -> None:
    found = rows_for(["yes" if n % 4 or n > 60 else "no" for n in range(80)])
    assert {name: row["interval_by"] for name, row in found.items()} == {
        "points": "half-samples",
        "accuracy": "bootstrap",
        "accuracy/left": "bootstrap",
    }
    for row in found.values():
        low, high = row["interval"]  # type: ignore[misc]
        assert low < row["value"] < high
    assert (found["points"]["chance"], found["accuracy"]["chance"], found["accuracy/left"]["count"]) == (None, 50.0, 40)


def test_points_over_pairs_have_the_spread_of_their_images() -> None:
    """Every image is all right or all wrong: points are twice the accuracy, and so is their interval."""
    found = rows_for(["yes" if n // 2 % 4 else "no" for n in range(80)])
    widths = {name: row["interval"][1] - row["interval"][0] for name, row in found.items()}  # type: ignore[index]
    assert found["points"]["value"] == 150.0 and found["accuracy"]["value"] == 75.0
    assert widths["points"] / widths["accuracy"] == pytest.approx(2.0, rel=0.15)


def test_a_judge_is_not_asked_for_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paired, "judged", True)
    found = rows_for(["yes"] * 79 + ["no"])
    assert found["points"]["interval"] is None and found["accuracy"]["interval"] is not None
