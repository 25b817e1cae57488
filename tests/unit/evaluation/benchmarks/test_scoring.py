"""What every scorer shares."""

from __future__ import annotations

from tinylmm.evaluation.benchmarks.scoring import percent, percent_by


def test_groups_come_in_the_order_in_which_they_first_occur_and_no_name_is_no_group() -> None:
    found = percent_by("type", ["b", "a", "", "b", "b"], [1.0, 0.0, 1.0, 0.0, 0.0])
    assert list(found.items()) == [("type/b", 33.33), ("type/a", 0.0)]
    assert percent_by("type", [], []) == {}


def test_percent_is_rounded_as_asked_and_nothing_is_zero() -> None:
    assert (percent([1, 0, 0]), percent([1, 0, 0], 1), percent([])) == (33.33, 33.3, 0.0)
    assert percent([1, 0, 0], None) == 100 / 3
