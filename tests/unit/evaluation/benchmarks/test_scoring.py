"""Metrics that know what they rest on, and percentages."""

from __future__ import annotations

from tinylmm.evaluation.benchmarks.records import Basis, Item
from tinylmm.evaluation.benchmarks.scoring import Metrics, percent


def rows(kinds: str) -> list[tuple[Item, float]]:
    return [(Item(str(n), n, "?", category=kind.strip()), float(n == 0)) for n, kind in enumerate(kinds)]


def test_groups_are_means_in_the_order_in_which_they_occur_and_an_empty_name_is_none() -> None:
    metrics = Metrics()
    metrics.means_by("type", rows("ba bb"), lambda item: item.category)
    assert metrics.aggregate == {"type/b": 33.33, "type/a": 0.0}
    assert metrics.bases["type/b"] == Basis(("0", "3", "4"), (1.0, 0.0, 0.0))
    assert list(metrics.aggregate) == ["type/b", "type/a"]


def test_sorted_groups_are_sorted_and_no_rows_are_no_groups() -> None:
    metrics = Metrics()
    metrics.means_by("type", rows("ba"), lambda item: item.category, ordered=True)
    assert list(metrics.aggregate) == ["type/a", "type/b"]
    metrics.means_by("other", [], lambda item: item.category)
    assert len(metrics.aggregate) == 2


def test_a_metric_that_is_no_mean_keeps_its_scale() -> None:
    metrics = Metrics()
    metrics.other("points", 150.0, [item for item, _ in rows("ab")], top=200.0)
    assert metrics.bases["points"] == Basis(("0", "1"), None, top=200.0)


def test_percentages_are_rounded_as_asked_and_nothing_is_zero() -> None:
    assert (percent([1, 0, 0]), percent([1, 0, 0], 1), percent([1, 0, 0], None)) == (33.33, 33.3, 100 / 3)
    assert percent([]) == 0.0
