"""doubt.py against direct simulation: sweeps are drawn from a known truth, and its intervals have to contain it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from tinylmm.reports.doubt import Estimate, Runs, difference_of, groups_alike, mean_of, needed

IMAGES, PER_IMAGE = 80, 3
TRIALS = 600


def draw(
    generator: np.random.Generator,
    cells: int,
    seeds: int,
    seed_sd: float,
    gains: tuple[float, ...] = (0.0,) * 8,
    common: np.ndarray | None = None,
) -> Runs:
    """Right and wrong answers of cells x seeds runs: some images are harder, some seeds are better, the rest is luck.

    Args:
        common: (cells, seeds) what is added to each run's seed effect, for runs that share something.
    """
    images = np.arange(IMAGES).repeat(PER_IMAGE)
    hard = generator.normal(0, 1, IMAGES)[images] + generator.normal(0, 0.5, IMAGES * PER_IMAGE)
    rows = []
    for cell in range(cells):
        good = generator.normal(0, seed_sd, seeds) + (0 if common is None else common[cell])
        luck = generator.normal(0, 0.6, (seeds, len(images)))
        rows.append(generator.random(luck.shape) < expit(0.5 + gains[cell] + hard + good[:, None] + luck))
    scores = 100.0 * np.concatenate(rows)
    count = len(scores)
    cell_of = np.arange(cells).repeat(seeds)
    return Runs(scores.mean(1), np.full(count, np.nan), scores, images, cell_of, np.arange(count), 100.0)


def truth(seed_sd: float, gain: float = 0.0) -> float:
    """The expected share of right answers over all seeds and images there could be."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = np.sqrt(seed_sd**2 + 1 + 0.25 + 0.36)
    return float(100 * (weights @ expit(0.5 + gain + spread * points)) / weights.sum())


def covered(found: list[Estimate], value: float) -> float:
    return float(np.mean([one.interval[0] <= value <= one.interval[1] for one in found]))


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 0.3, 1.0], ids=["no seed noise", "some", "much", "more than all else"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_of_a_cell_covers_the_truth(seeds: int, seed_sd: float) -> None:
    generator = np.random.default_rng(seeds)
    found = [mean_of(draw(generator, 1, seeds, seed_sd), 0) for _ in range(TRIALS)]
    assert 0.92 <= covered(found, truth(seed_sd)) <= 0.985


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 0.3], ids=["no seed noise", "some", "much"])
def test_interval_of_a_difference_covers_the_truth(seed_sd: float) -> None:
    generator = np.random.default_rng(7)
    found = [difference_of(draw(generator, 2, 3, seed_sd, (0.0, 0.3)), {0: -1, 1: 1}) for _ in range(TRIALS)]
    assert 0.93 <= covered(found, truth(seed_sd, 0.3) - truth(seed_sd)) <= 0.99


def test_equal_cells_are_told_apart_as_often_as_the_p_value_says() -> None:
    generator = np.random.default_rng(11)
    found = [difference_of(draw(generator, 2, 3, 0.2), {0: -1, 1: 1}).p_value for _ in range(2 * TRIALS)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.04, abs=0.025)


def test_questions_alone_would_not_cover_where_seeds_matter() -> None:
    generator = np.random.default_rng(5)
    runs = [draw(generator, 1, 1, 0.3) for _ in range(TRIALS)]
    found = [mean_of(one, 0) for one in runs]
    assert covered(found, truth(0.3)) < 0.85
    assert not any(one.seeds_known for one in found)


def test_variance_is_that_of_the_means_of_many_sweeps() -> None:
    generator = np.random.default_rng(3)
    found = [mean_of(draw(generator, 1, 4, 0.2), 0) for _ in range(4 * TRIALS)]
    expected = np.var([one.value for one in found])
    assert np.mean([one.error**2 for one in found]) == pytest.approx(expected, rel=0.12)


def test_variance_is_that_of_a_bootstrap_on_both_levels() -> None:
    """Seeds and images drawn with replacement, the seeds' deviations made as large as those of so few must be."""
    runs = draw(np.random.default_rng(2), 1, 40, 0.3)
    assert runs.scores is not None
    generator, means = np.random.default_rng(4), []
    table = runs.scores.reshape(40, IMAGES, PER_IMAGE).mean(2)
    for _ in range(4000):
        means.append(table[generator.integers(0, 40, 40)][:, generator.integers(0, IMAGES, IMAGES)].mean())
    assert mean_of(runs, 0).error == pytest.approx(np.std(means), rel=0.06)


def test_what_runs_share_cancels_in_their_difference_or_counts_twice() -> None:
    """Both cells of a pair go on from one pretraining a seed, and so do all four of an interaction's contexts."""
    generator = np.random.default_rng(13)
    together, alone = [], []
    for _ in range(TRIALS):
        shared = np.repeat(generator.normal(0, 0.4, (1, 3)), 2, axis=0)
        arm = np.concatenate([np.zeros((2, 3)), shared])  # noise of one arm only, the same in both of its contexts
        runs = draw(generator, 4, 3, 0.05, common=arm)
        tied = Runs(
            *(runs.values, runs.errors, runs.scores, runs.clusters, runs.cells), np.tile(np.arange(3), 4), 100.0
        )
        weights = {0: -0.5, 1: -0.5, 2: 0.5, 3: 0.5}
        together.append(difference_of(tied, weights))
        alone.append(difference_of(runs, weights))
    value = truth(np.hypot(0.4, 0.05)) - truth(0.05)
    assert 0.92 <= covered(together, value) <= 0.99
    assert covered(alone, value) < covered(together, value)


def test_an_interval_stays_on_the_scale_and_no_spread_is_no_certainty() -> None:
    ones = np.full((3, 40), 100.0)
    runs = Runs(ones.mean(1), np.full(3, np.nan), ones, np.arange(40), np.zeros(3, int), np.arange(3), 100.0)
    low, high = mean_of(runs, 0).interval
    assert high == 100 and low == pytest.approx(91.2, abs=0.1)  # Wilson's of 40 of 40
    cells = Runs(runs.values, runs.errors, ones, runs.clusters, np.array([0, 0, 1]), np.arange(3), 100.0)
    found = difference_of(cells, {0: -1, 1: 1})
    assert found.interval[0] < 0 < found.interval[1] and found.p_value == 1


def test_without_questions_more_seeds_do_not_shrink_what_questions_add() -> None:
    values = np.array([70.0, 71.0, 72.0] * 4)
    runs = Runs(values, np.full(12, 2.0), None, np.zeros(0, int), np.zeros(12, int), np.arange(12), None)
    found = mean_of(runs, 0)
    assert found.item_variance == 4
    assert found.seed_variance == pytest.approx(values.var(ddof=1) / 12)


def test_needed_seeds_tell_apart_in_four_of_five_tries() -> None:
    generator = np.random.default_rng(17)
    pilot = [difference_of(draw(generator, 2, 4, 0.3, (0.0, 0.6)), {0: -1, 1: 1}) for _ in range(40)]
    middle = sorted(pilot, key=lambda one: one.seed_variance)[20]
    known = Estimate(**{**vars(middle), "value": truth(0.3, 0.6) - truth(0.3)})
    wanted = needed(known).seeds
    assert wanted is not None and 4 <= wanted <= 12
    again = [difference_of(draw(generator, 2, wanted, 0.3, (0.0, 0.6)), {0: -1, 1: 1}) for _ in range(TRIALS)]
    assert np.mean([one.p_value < 0.05 for one in again]) == pytest.approx(0.8, abs=0.12)


def test_no_number_of_seeds_helps_where_questions_are_too_few() -> None:
    found = Estimate(0.5, 1.0, 4.0, 20, 4, (-4, 5), 0.8, True, 3, 100)
    assert needed(found).seeds is None
    assert needed(Estimate(**{**vars(found), "value": 0.0})) == needed(found)
    few = Estimate(6.0, 0.0, 9.0, 99, 0, (0, 12), 0.05, False, 1, 100)
    assert needed(few).seeds is None and 1 < (needed(few).questions or 0) < 3


@pytest.mark.parametrize(
    ("count", "apart", "groups"),
    [
        (3, [], [(0, 1, 2)]),
        (3, [(0, 2)], [(0, 1), (1, 2)]),
        (3, [(0, 1)], [(0, 2), (1, 2)]),
        (4, [(0, 2), (0, 3), (1, 2), (1, 3)], [(0, 1), (2, 3)]),
        (2, [(1, 0)], [(0,), (1,)]),
    ],
    ids=["all alike", "the ends apart", "a gap inside", "two groups", "two"],
)
def test_groups_hold_every_pair_that_is_alike_and_none_that_is_not(
    count: int, apart: list[tuple[int, int]], groups: list[tuple[int, ...]]
) -> None:
    assert groups_alike(count, apart) == groups
