"""Intervals and paired tests against what can be worked out by hand, and against simulation."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from tinylmm.evaluation.statistics import (
    bootstrap_mean,
    half_samples,
    holm,
    interval_on_scale,
    mean_interval,
    paired_p_value,
    wilson,
)


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


@pytest.mark.parametrize("grade", [0.0, 0.5, 1.0])
def test_equal_grades_are_no_certainty_and_get_wilsons_interval_over_the_images(grade: float) -> None:
    (low, high), by = mean_interval([grade] * 40, [n // 2 for n in range(40)])
    assert by == "wilson" and (low, high) == wilson(grade, 20)
    assert 0 <= low <= grade <= high <= 1 and high - low > 0.1


def test_images_that_are_all_half_right_show_resampling_nothing_either() -> None:
    assert mean_interval([0.0, 1.0] * 20, [n // 2 for n in range(40)]) == (wilson(0.5, 20), "wilson")
    assert bootstrap_mean([], []) is None


@pytest.mark.parametrize(
    ("value", "top"), [(0.0, 100.0), (1.0, 100.0), (99.5, 100.0), (1990.0, 2000.0), (100.0, 100.0)]
)
def test_an_interval_stays_on_its_scale(value: float, top: float) -> None:
    low, high = interval_on_scale(value, 0.05 * top, 50, top)
    assert 0 <= low <= value <= high <= top and low < high


def test_in_the_middle_of_a_scale_the_interval_is_the_usual_one() -> None:
    low, high = interval_on_scale(1000.0, 40.0, 50, 2000.0)
    assert (low, high) == pytest.approx((1000 - 78.4, 1000 + 78.4), abs=1.0)
    assert interval_on_scale(0.5, 1.0, 50, None) == pytest.approx((0.0, 0.5 + 1.96), abs=0.001)


def test_half_samples_agree_with_the_bootstrap_where_both_apply() -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2, 400).astype(float).tolist()
    found = half_samples(
        lambda chosen: {"mean": 100 * float(np.mean([values[i] for i in chosen]))}, range(400), ["mean"]
    )
    boot = bootstrap_mean(values, range(400)) or (0, 0)
    ours = interval_on_scale(100 * float(np.mean(values)), found["mean"], 400, 100.0)
    assert ours == pytest.approx((100 * boot[0], 100 * boot[1]), abs=1.0)


def test_half_samples_keep_an_image_together_and_never_repeat_it() -> None:
    clusters = [n // 2 for n in range(20)]

    def pairs_right(chosen: list[int]) -> dict[str, float]:  # type: ignore[type-arg]
        assert len(set(chosen)) == len(chosen) == 10
        assert all((i ^ 1) in chosen for i in chosen)  # the other question about the same image is there too
        return {"pairs": float(len(chosen)), "first": float(min(chosen))}

    found = half_samples(pairs_right, clusters, ["pairs", "first", "absent"], halves=20)  # type: ignore[arg-type]
    assert found["pairs"] == 0.0 < found["first"] and "absent" not in found
    assert half_samples(pairs_right, ["a", "a"], ["pairs"]) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0, 0, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (5, 5, 1.0), (0, 10, 2 / 1024)],
)
def test_with_one_question_an_image_the_test_is_mcnemars(first: int, second: int, expected: float) -> None:
    differences = [-1.0] * first + [1.0] * second + [0.0] * 20
    assert paired_p_value(differences, range(len(differences))) == pytest.approx(expected)


def test_thousands_of_flips_do_not_overflow() -> None:
    # scipy.stats.binomtest(1000, 2200, 0.5).pvalue
    assert paired_p_value([-1.0] * 1000 + [1.0] * 1200, range(2200)) == pytest.approx(2.1817e-05, rel=1e-4)
    assert paired_p_value([-1.0] * 5000 + [1.0] * 5000, range(10_000)) == pytest.approx(1.0)


def test_six_equal_flips_of_one_image_count_once() -> None:
    """Ten images flipped, eight the one way: the p of 2 against 8, not of 12 against 48 (3e-6)."""
    differences = [-1.0] * 48 + [1.0] * 12
    assert paired_p_value(differences, [n // 6 for n in range(60)]) == pytest.approx(2 * 56 / 1024)


def test_grades_are_flipped_at_random_as_whole_numbers_are_by_counting() -> None:
    draw = np.random.default_rng(3)
    clusters = (np.arange(300) // 3).tolist()
    whole = draw.integers(-1, 2, 300).astype(float) + 0.12
    counted = paired_p_value(np.rint(whole).tolist(), clusters)
    assert paired_p_value((np.rint(whole) / 3).tolist(), clusters) == pytest.approx(counted, abs=0.02)


def test_a_paired_test_sees_a_small_steady_gain_and_no_gain() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 200)
    assert paired_p_value((0.05 + noise).tolist(), range(200)) < 0.001
    assert paired_p_value(noise.tolist(), range(200)) > 0.05
    assert paired_p_value([0.0] * 5, range(5)) == paired_p_value([1.0, -1.0], ["a", "a"]) == 1.0


@pytest.mark.parametrize("questions", [1, 6, 20])
def test_equal_models_are_told_apart_at_most_as_often_as_is_said(questions: int) -> None:
    draw = np.random.default_rng(questions)
    clusters = np.repeat(np.arange(80), questions)
    found = 0
    for _ in range(400):
        image = draw.normal(0, 1, 80).repeat(questions)
        a, b = (image + draw.normal(0, 1, 80).repeat(questions) > draw.normal(0, 0.3, len(clusters)) for _ in range(2))
        found += paired_p_value((b.astype(float) - a).tolist(), clusters.tolist()) < 0.05
    assert found <= 0.06 * 400


def test_holm_raises_each_p_by_how_many_are_left() -> None:
    # statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03, 0.005], method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.04]) == [0.04] and holm([]) == []
