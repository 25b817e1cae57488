"""How sure a mean over seeds is, and a difference between such means: over seeds and over questions at once. No torch.

Every run of a cell was asked the same questions, so seeds and questions are crossed: a run's mean is off by its seed, all means
by the choice of questions. The variance is that of a bootstrap on two levels (runs and images with replacement:
A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007) in closed form, without what both levels count twice
(J. Cornfield and J. W. Tukey, Annals of Mathematical Statistics 27, 1956). Ends are at a t quantile with the degrees of freedom
of F. E. Satterthwaite (Biometrics Bulletin 2, 1946), as two or three seeds drawn with replacement cover far too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from tinylmm.evaluation.statistics import Z_95, interval_on_scale, wilson

POWER = 0.8
"""Chance with which `needed` wants a difference to be found."""
MOST_SEEDS = 1000
MOST_QUESTIONS = 100
"""Times as many: of more nobody would think."""
MANY = 1e9
"""Degrees of freedom of what is as good as known."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """The runs of one column of a sweep: what was asked of all of them, and what each got.

    Attributes:
        values: (R,) the metric of each run, in its own unit.
        errors: (R,) its standard error over questions; nan where that is not known.
        scores: (R, I) what each question adds to the metric, so that a row's mean is its value; None for metrics that are no
            mean over questions, and where not all were asked the same.
        clusters: (I,) the image of each question.
        cells: (R,) the cell of each run.
        units: (R,) equal for runs that are not independent, as they share a training that the seed decides.
        top: end of the metric's scale; None where it has none.
    """

    values: Floats
    errors: Floats
    scores: Floats | None
    clusters: Ints
    cells: Ints
    units: Ints
    top: float | None = None

    def of_cell(self, cell: int) -> Ints:
        """Indices of its runs."""
        return np.flatnonzero(self.cells == cell)

    def spread(self, cell: int) -> float | None:
        """Standard deviation over its seeds; None for one seed."""
        values = self.values[self.of_cell(cell)]
        return float(values.std(ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a difference of such means.

    Attributes:
        value: in the metric's unit.
        seed_variance, item_variance: what seeds and questions add to its variance.
        freedom: degrees of freedom of both together; seed_freedom of the seeds'.
        interval: 95 %.
        p_value: of "it is 0", two-sided; 1 where nothing is known.
        seeds_known: whether every cell that takes part has two seeds; where not, seeds are not in the interval.
        seeds, clusters: how many runs a cell there are on average, and how many images.
    """

    value: float
    seed_variance: float
    item_variance: float
    freedom: float
    seed_freedom: float
    interval: tuple[float, float]
    p_value: float
    seeds_known: bool
    seeds: float
    clusters: int

    @property
    def error(self) -> float:
        """Standard error."""
        return sqrt(self.seed_variance + self.item_variance)


def mean_of(runs: Runs, cell: int) -> Estimate:
    """The mean of a cell over its seeds; its interval never leaves the metric's scale."""
    return _estimate(runs, _weights(runs, {cell: 1.0}), runs.top, difference=False)


def mean_over(runs: Runs, cells: Sequence[int]) -> Estimate:
    """The mean of several cells' means."""
    return _estimate(runs, _weights(runs, dict.fromkeys(cells, 1 / len(cells))), runs.top, difference=False)


def difference_of(runs: Runs, weights: dict[int, float]) -> Estimate:
    """A contrast between cells' means.

    Args:
        weights: cell -> its weight; they sum to 0. `{a: -1, b: 1}` is how much better b is than a.
    """
    return _estimate(runs, _weights(runs, weights), None, difference=True)


def _weights(runs: Runs, cells: dict[int, float]) -> Floats:
    """(R,) the weight of each run: its cell's, shared among the cell's runs."""
    weights = np.zeros(len(runs.values))
    for cell, weight in cells.items():
        members = runs.of_cell(cell)
        weights[members] = weight / len(members)
    return weights


def _estimate(runs: Runs, weights: Floats, top: float | None, difference: bool) -> Estimate:
    used = np.flatnonzero(weights)
    cells = sorted(set(runs.cells[used].tolist()))
    members = [runs.of_cell(cell) for cell in cells]
    value = float(sum(weights[one[0]] * runs.values[one].sum() for one in members))
    seed, seed_freedom, factors = _seed_variance(runs, weights, used)
    item, images, double = _item_variance(runs, weights, used, factors)
    net = max(seed - double, 0.0)
    total = net + item
    spent = (seed**2 / seed_freedom if seed_freedom else 0.0) + item**2 / max(images - 1, 1)
    freedom = total**2 / spent if spent > 0 else MANY
    known = all(len(one) > 1 for one in members)
    interval, p_value = _ends(value, total, freedom, images, top, difference)
    seeds = len(used) / len(cells)
    return Estimate(value, net, item, freedom, seed_freedom, interval, p_value, known, seeds, images)


def _seed_variance(runs: Runs, weights: Floats, used: Ints) -> tuple[float, float, Floats]:
    """What seeds add to the variance, with its degrees of freedom, and (R,) the factor that each deviation takes part with.

    Deviations from a cell's mean are added up within each unit: what runs share cancels in a difference, or counts twice.
    """
    factors = np.zeros(len(weights))
    deviations = np.zeros(len(weights))
    cells = sorted(set(runs.cells[used].tolist()))
    for cell in cells:
        members = runs.of_cell(cell)
        if len(members) > 1:
            factors[members] = weights[members] * sqrt(len(members) / (len(members) - 1))
            deviations[members] = runs.values[members] - runs.values[members].mean()
    sums = _by_unit((factors * deviations)[:, None], runs.units, used)[:, 0]
    several = used[factors[used] != 0]
    if not len(several):
        return 0.0, 0.0, factors
    seeds = len(several) / len(set(runs.cells[several].tolist()))
    units = len(set(runs.units[several].tolist()))
    return float(sums @ sums), max(units * (1 - 1 / seeds), 1.0), factors


def _item_variance(runs: Runs, weights: Floats, used: Ints, factors: Floats) -> tuple[float, int, float]:
    """What questions add to the variance, how many images they are about, and what of it the seeds' variance holds already."""
    if runs.scores is None:
        by_cell = [used[runs.cells[used] == cell] for cell in sorted(set(runs.cells[used].tolist()))]
        # the questions are the same for all seeds: more seeds make this no smaller
        known = [weights[members].sum() ** 2 * np.nanmean(runs.errors[members] ** 2) for members in by_cell]
        return float(np.nansum(known)), int(MANY), 0.0
    scores = runs.scores[used]
    residuals = np.zeros_like(scores)
    for cell in set(runs.cells[used].tolist()):
        members = runs.cells[used] == cell
        residuals[members] = scores[members] - scores[members].mean(0)
    shares = _by_unit(factors[used][:, None] * residuals, runs.units[used], np.arange(len(used)))
    images = int(runs.clusters.max()) + 1
    item = _cluster_variance((weights[used] @ scores)[None], runs.clusters, images)
    return float(item[0]), images, float(_cluster_variance(shares, runs.clusters, images).sum())


def _by_unit(rows: Floats, units: Ints, used: Ints) -> Floats:
    """(U, ...) sums of the rows of each unit."""
    _, places = np.unique(units[used], return_inverse=True)
    sums = np.zeros((int(places.max()) + 1, rows.shape[1]))
    np.add.at(sums, places, rows[used])
    return sums


def _cluster_variance(rows: Floats, clusters: Ints, images: int) -> Floats:
    """Variance of each row's mean when whole clusters are drawn with replacement."""
    centred = rows - rows.mean(1, keepdims=True)
    sums = np.stack([np.bincount(clusters, row, minlength=images) for row in centred])
    return np.asarray((sums**2).sum(1) / rows.shape[1] ** 2 * images / max(images - 1, 1))


def _ends(
    value: float, variance: float, freedom: float, images: int, top: float | None, difference: bool
) -> tuple[tuple[float, float], float]:
    from scipy.special import stdtr, stdtrit

    if variance < 1e-20:  # rounding
        return _without_spread(value, images, top, difference)
    quantile = float(stdtrit(freedom, 0.975))
    error = sqrt(variance)
    p_value = float(2 * stdtr(freedom, -abs(value) / error))
    if difference or top is None:
        return (value - quantile * error, value + quantile * error), p_value
    return interval_on_scale(value, error * quantile / Z_95, images, top), p_value


def _without_spread(
    value: float, images: int, top: float | None, difference: bool
) -> tuple[tuple[float, float], float]:
    """Where nothing varies, which is no certainty: Wilson's interval over the images."""
    if not difference:
        return (value, value) if top is None else interval_on_scale(value, 0.0, images, top), 1.0
    low, high = wilson(min(abs(value) / 100, 1.0), images)
    if value == 0:
        return (-100 * high, 100 * high), 1.0
    ends = (100 * low, 100 * high) if value > 0 else (-100 * high, -100 * low)
    return ends, max(2.0 ** (1 - min(images, 60)), 0.0)  # that of flipping the images' signs


@dataclass(frozen=True)
class Needed:
    """What would tell two cells apart in four of five tries, were the difference the one that was seen.

    Attributes:
        seeds: a cell, with the questions that there are; None where no number of seeds is enough, or their noise unknown.
        questions: times as many, with the seeds that there are; None likewise.
    """

    seeds: int | None
    questions: float | None


def needed(found: Estimate) -> Needed:
    """How many seeds or questions would tell the two cells of a difference apart, at 5 % and with a power of 80 %.

    Args:
        found: a difference of two cells' means.
    """
    if found.value == 0:
        return Needed(None, None)
    seeds = None
    if found.seeds_known and found.seed_variance > 0:
        floor = max(int(found.seeds), 2)
        tries = (count for count in range(floor, MOST_SEEDS + 1) if _finds(found, count / found.seeds, 1.0))
        seeds = next(tries, None)
    steps = (1.1**step for step in range(1, 60) if 1.1**step < MOST_QUESTIONS)
    questions = next((times for times in steps if _finds(found, 1.0, times)), None)
    return Needed(seeds, questions if found.item_variance > 0 else None)


def _finds(found: Estimate, seeds: float, questions: float) -> bool:
    """Whether so many times the seeds and the questions give the power."""
    from scipy.special import stdtrit

    seed, item = found.seed_variance / seeds, found.item_variance / questions
    runs = found.seed_freedom + 2 * found.seeds * (seeds - 1)
    spent = (seed**2 / runs if runs else 0.0) + item**2 / max(found.clusters * questions - 1, 1)
    freedom = (seed + item) ** 2 / spent if spent > 0 else MANY
    reach = float(stdtrit(freedom, 0.975) + stdtrit(freedom, POWER))
    return isfinite(reach) and abs(found.value) >= reach * sqrt(seed + item)


def groups_alike(count: int, apart: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The largest groups of which no two members are told apart: the letters of a compact letter display.

    Args:
        count: how many members there are, 0 to count - 1, best first.
        apart: pairs that are told apart, in any order.

    Returns:
        groups in the order of their best members; every pair that is not told apart shares at least one.
    """
    different = {frozenset(pair) for pair in apart}
    groups: list[set[int]] = []
    for member in range(count):  # insert and absorb (H.-P. Piepho, J. Computational and Graphical Statistics 13, 2004)
        kept: list[set[int]] = [{member}]
        for group in groups:
            alike = {other for other in group if frozenset((member, other)) not in different}
            kept.append(group | {member} if alike == group else group)
            kept.append(alike | {member})
        groups = [group for group in kept if not any(group < other for other in kept)]
        groups = [group for index, group in enumerate(groups) if group not in groups[:index]]
    return sorted(tuple(sorted(group)) for group in groups)
