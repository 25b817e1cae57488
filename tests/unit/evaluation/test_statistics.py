"""Intervals and paired tests against what can be worked out by hand, and against simulation."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from tinylmm.evaluation.statistics import bootstrap_mean, half_samples, mcnemar, paired_p_value, wilson


def test_a_bootstrap_interval_is_that_of_the_binomial_for_independent_questions() -> None:
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap_mean(values, range(400)) or (0, 0)
    half = 1.96 * sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.004) and high == pytest.approx(0.75 + half, abs=0.004)
    assert bootstrap_mean(values, range(400)) == (low, high)  # a fixed seed


def test_questions_about_one_image_count_as_one_where_they_agree() -> None:
    values = ([1.0] * 10) * 30 + ([0.0] * 10) * 10
    independent = bootstrap_mean(values, range(400)) or (0, 0)
    clustered = bootstrap_mean(values, [n // 10 for n in range(400)]) or (0, 0)
    assert (clustered[1] - clustered[0]) / (independent[1] - independent[0]) == pytest.approx(sqrt(10), rel=0.1)


def test_all_right_is_no_certainty_and_nothing_has_no_interval() -> None:
    low, high = bootstrap_mean([1.0] * 20, range(20)) or (0, 0)
    assert high == 1.0 and low == pytest.approx(wilson(1.0, 20)[0]) and low < 0.9
    assert bootstrap_mean([], []) is None
    assert bootstrap_mean([0.0], ["a"]) == wilson(0.0, 1)


def test_half_samples_agree_with_the_bootstrap_where_both_apply() -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2, 400).astype(float).tolist()
    whole = {"mean": 100 * float(np.mean(values))}
    found = half_samples(lambda chosen: {"mean": 100 * float(np.mean([values[i] for i in chosen]))}, range(400), whole)
    boot = bootstrap_mean(values, range(400)) or (0, 0)
    assert found["mean"][0] == pytest.approx(100 * boot[0], abs=1.0)
    assert found["mean"][1] == pytest.approx(100 * boot[1], abs=1.0)


def test_half_samples_keep_an_image_together_and_never_repeat_it() -> None:
    clusters = [n // 2 for n in range(20)]

    def pairs_right(chosen: list[int]) -> dict[str, float]:  # type: ignore[type-arg]
        assert len(set(chosen)) == len(chosen) == 10
        assert all((i ^ 1) in chosen for i in chosen)  # the other question about the same image is there too
        return {"pairs": float(len(chosen)), "first": float(min(chosen))}

    found = half_samples(pairs_right, clusters, {"pairs": 20.0, "first": 0.0}, halves=20)  # type: ignore[arg-type]
    assert list(found) == ["first"]  # what is the same in every half shows no spread, which is no certainty
    assert half_samples(pairs_right, ["a", "a"], {"pairs": 2.0}) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0, 0, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (5, 5, 1.0), (0, 10, 2 / 1024)],
)
def test_mcnemar_is_the_binomial_tail(first: int, second: int, expected: float) -> None:
    assert mcnemar(first, second) == pytest.approx(expected)


def test_mcnemar_of_thousands_of_flips_does_not_overflow() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(1000, 1200) < 1e-4


def test_a_paired_test_sees_a_small_steady_gain_and_no_gain() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 200)
    assert paired_p_value((0.05 + noise).tolist(), range(200)) < 0.001
    assert paired_p_value(noise.tolist(), range(200)) > 0.05
    assert paired_p_value([0.0] * 5, range(5)) == 1.0
