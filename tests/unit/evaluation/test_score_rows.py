"""Rows of scores.json: the headline first, each metric with the interval that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.registry import get_benchmark
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


# ------------------------------------------------------------------------------ what the shipped benchmarks' figures rest on


def picture(name: object) -> tuple[ImageRef, ...]:
    return (ImageRef(Path(f"{name}.png")),)


def figures(
    name: str, items: Sequence[Item], said: Sequence[str], blind: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    benchmark = get_benchmark(name)
    answers, unseen = (
        {item.item_id: Answer(text) for item, text in zip(items, texts, strict=True)} for texts in (said, blind or said)
    )
    scores, other = benchmark.score(items, answers), benchmark.score(items, unseen) if blind else None
    return {str(row["metric"]): row for row in score_rows(benchmark, items, answers, scores, other)}


def counts(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {name: row["count"] for name, row in rows.items()}


def test_sqa_counts_the_questions_with_an_image_where_it_scores_those() -> None:
    reference = {"answer": "A", "options": {"A": "x", "B": "y"}, "in_split": True}
    items = [
        Item(str(n), n, "?", picture(n) if n < 100 else (), "natural", {**reference, "has_image": n < 100}, 2)
        for n in range(400)
    ]
    rows = figures("sqa", items, ["AB"[n % 10 == 0] for n in range(400)])
    assert counts(rows) == {"img_accuracy": 100, "accuracy": 400, "subject/natural": 400}
    assert rows["img_accuracy"]["chance"] == 50.0 and rows["img_accuracy"]["interval_by"] == "bootstrap"


def test_mmbench_counts_questions_and_not_their_rotations() -> None:
    items = [
        Item(
            str(base + 1_000_000 * turn),
            base,
            "?",
            picture(base),
            "colour",
            {
                "index": base + 1_000_000 * turn,
                "base": base,
                "question": "?",
                "options": {"A": "x", "B": "y"},
                "answer": "AB"[turn],
                "l2": "fine",
                "row": {},
            },
            2,
        )
        for turn in range(2)
        for base in range(30)
    ]
    rows = figures("mmbench", items, ["AB"[int(item.item_id) >= 1_000_000 or item.question_id == 0] for item in items])
    assert counts(rows) == {"accuracy": 30, "category/colour": 30, "l2/fine": 30}
    assert rows["accuracy"]["value"] == 96.67 and rows["accuracy"]["chance"] is None
    assert 0 < rows["accuracy"]["interval"][0] < 96.67 < rows["accuracy"]["interval"][1] <= 100


def test_mmmu_counts_the_questions_of_a_domain() -> None:
    items = [
        Item(f"v_{subject}_{n}", n, "?", picture(f"{subject}{n}"), subject, {"options": {"A": "x"}, "gold": ["A"]}, 1)
        for subject in ("Art", "Math", "Physics")
        for n in range(30)
    ]
    rows = figures("mmmu", items, ["A"] * 90)
    assert counts(rows) == {
        "overall": 90,
        "domain/Art and Design": 30,
        "domain/Science": 60,
        **{f"subject/{subject}": 30 for subject in ("Art", "Math", "Physics")},
    }


def pope_items() -> list[Item]:
    return [
        Item(f"{kind}{n}", n, "?", picture(n // 6), kind, "yes" if n % 2 else "no", 2)
        for kind in ("random", "popular", "adversarial")
        for n in range(60)
    ]


def test_pope_intervals_never_leave_the_scale_and_rows_count_their_category() -> None:
    items = pope_items()
    wrong = {"yes": "no", "no": "yes"}
    rows = figures("pope", items, [wrong[i.reference] if i.question_id % 20 == 0 else i.reference for i in items])
    assert rows["f1"]["count"] == rows["accuracy"]["count"] == 180 and rows["adversarial/f1"]["count"] == 60
    assert all(0 <= row["interval"][0] <= row["value"] <= row["interval"][1] <= 100 for row in rows.values())
    assert rows["f1"]["value"] > 94 and rows["f1"]["interval_by"] == "half-samples"
    assert (rows["accuracy"]["interval_by"], rows["accuracy"]["chance"]) == ("bootstrap", 50.0)


def test_all_right_is_no_certainty_in_any_metric() -> None:
    rows = figures("pope", pope_items(), [item.reference for item in pope_items()])
    for name in ("f1", "accuracy", "precision", "random/recall"):
        low, high = rows[name]["interval"]
        assert rows[name]["value"] == high == 100 and low < 80, name  # ten images


def test_mme_counts_images_where_both_answers_must_be_right_and_perception_without_cognition() -> None:
    items = [
        Item(f"{task}/{n}#{turn}", f"{task}/{n}", "?", picture(f"{task}{n}"), task, "yes", 2)
        for task in ("existence", "code_reasoning")
        for n in range(20)
        for turn in range(2)
    ]
    rows = figures("mme", items, ["yes" if n % 10 else "no" for n in range(80)])
    assert counts(rows) | {"perception": 40, "cognition": 40, "existence/acc": 40, "existence/acc+": 20} == counts(rows)
    assert rows["existence/acc+"]["chance"] is None and rows["existence/acc"]["chance"] == 50.0
    assert 0 <= rows["perception"]["interval"][0] < 170 < rows["perception"]["interval"][1] <= 200


def test_the_difference_from_blind_is_tested_by_image() -> None:
    items = pope_items()[:60]
    rows = figures("pope", items, [i.reference for i in items], [("yes", "no")[i.question_id < 54] for i in items])
    # ten images; each loses half of its six questions without being seen
    assert rows["random/accuracy"]["blind_p"] == pytest.approx(2 / 2**10)
    assert figures("pope", items, ["yes"] * 60)["accuracy"]["blind_p"] is None


def test_relative_scores_of_a_judge_have_intervals_from_the_ratings_that_it_gave() -> None:
    benchmark = get_benchmark("llava_bench")
    items = [
        Item(str(n), n, "?", picture(n // 3), ("conv", "detail", "complex")[n % 3], {"gpt4": "g"}) for n in range(60)
    ]
    rows = tuple(ItemScore(str(n), float(5 + n % 4), [8.0, float(5 + n % 4)]) for n in range(60))
    scores = Scores("llava_bench", "llava", dict(benchmark.regraded(items, rows) or {}), rows, {"scored": 60})
    answers = {item.item_id: Answer("x") for item in items}
    found = {row["metric"]: row for row in score_rows(benchmark, items, answers, scores, None, judged=True)}
    low, high = found["all"]["interval"]
    assert found["all"]["value"] == 81.2 and found["all"]["interval_by"] == "half-samples"
    assert 75 < low < 81.2 < high < 88
    assert found["model/all"]["interval"][0] < 6.5 < found["model/all"]["interval"][1]
