"""How sure a score is: 95 % intervals by resampling images, and paired tests between two models. No torch.

Questions about one image are not independent, so whole images are drawn, with every question about them. Seeds are fixed:
the same answers always give the same interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

SEED = 20240519
DRAWS = 5000
FLIPS = 20_000
"""Drawn assignments of signs, where there are too many to count: no p-value is below 1 / (FLIPS + 1) then."""
HALVES = 200
SURE = 0.05
"""A difference with a smaller p-value is called one."""
Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
_CHUNK = 4_000_000

Interval = tuple[float, float]


def bootstrap_mean(values: Sequence[float], clusters: Sequence[Hashable], seed: int = SEED) -> Interval | None:
    """95 % percentile interval of the mean, drawing clusters with replacement (B. Efron, Annals of Statistics 7, 1979).

    Args:
        values: one a question.
        clusters: what each belongs to (its image); as many.

    Returns:
        (low, high), which never leaves the range of the values, or None where resampling has nothing to go by: there are no
        values, or the mean is the same however the clusters are drawn (all are equal, or all come from one image).
    """
    if not values or len(set(values)) == 1:
        return None
    sums, counts = _by_cluster(values, clusters)
    if np.ptp(sums / counts) < 1e-12:
        return None
    means = [sums[index].sum(1) / counts[index].sum(1) for index in _draws(len(sums), seed)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[Interval, str]:
    """95 % interval of a mean of grades in [0, 1], and by which rule: `bootstrap`, or `wilson` where resampling shows nothing.

    Wilson's is then that of a share of this size among as many questions as there are clusters: no grades in [0, 1] with
    this mean vary more than right and wrong do.
    """
    found = bootstrap_mean(values, clusters)
    if found is not None:
        return found, "bootstrap"
    return wilson(min(max(float(np.mean(values)), 0.0), 1.0), len(set(clusters))), "wilson"


def half_samples(
    metrics: Callable[[Sequence[int]], Mapping[str, float]],
    clusters: Sequence[Hashable],
    names: Sequence[str],
    halves: int = HALVES,
    seed: int = SEED,
) -> dict[str, float]:
    """Standard errors of metrics of any kind, from how they vary between random halves of the clusters.

    A half drawn without replacement varies about the whole as the whole varies about the truth (the delete-half jackknife:
    J. Shao and C. F. J. Wu, Annals of Statistics 17, 1989). Unlike a bootstrap it never asks a scorer about an image twice,
    so it holds for scores that pair or group questions.

    Args:
        metrics: indices of questions, ascending -> the metrics of these questions alone.
        clusters: what each question belongs to.
        names: of the metrics that are wanted; one that any half lacks gets none.
    """
    members = _members(clusters)
    if len(members) < 4:
        return {}
    generator = np.random.default_rng(seed)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(halves):
        chosen = generator.permutation(len(members))[: len(members) // 2]
        found = metrics(sorted(index for place in chosen for index in members[place]))
        for name in seen:
            if name in found:
                seen[name].append(found[name])
    # an odd number of clusters makes halves a little smaller, and their spread a little larger than need be
    return {name: float(np.std(values)) for name, values in seen.items() if len(values) == halves}


def interval_on_scale(value: float, error: float, clusters: int, top: float | None) -> Interval:
    """95 % interval of a metric from its standard error, inside the metric's scale.

    On a scale from 0 to `top` it is Wilson's interval of the share value / top, of as many questions as would have this
    standard error: near an end of the scale it is lopsided instead of leaving it. Without any spread, which is no
    certainty, it is that of as many questions as there are clusters. On a scale without an end it is value +- 1.96 errors,
    not below 0.

    Args:
        value: of the metric, at least 0.
        error: its standard error.
        clusters: how many images it rests on, at least 1.
        top: the scale's end; None where there is none.
    """
    if top is None:
        return max(0.0, value - Z_95 * error), value + Z_95 * error
    share = min(max(value / top, 0.0), 1.0)
    spread = (error / top) ** 2
    count = share * (1 - share) / spread if spread > 0 and 0 < share < 1 else clusters
    low, high = wilson(share, max(count, 1.0))
    return top * low, top * high


def wilson(share: float, count: float) -> Interval:
    """95 % interval of a share in [0, 1] of `count` questions (E. B. Wilson, JASA 22, 1927)."""
    square = Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * sqrt(share * (1 - share) / count + square / (4 * count))
    # the ends are 0 and 1 themselves, which rounding misses
    return 0.0 if share == 0 else max(0.0, middle - half), 1.0 if share == 1 else min(1.0, middle + half)


def paired_p_value(differences: Sequence[float], clusters: Sequence[Hashable], seed: int = SEED) -> float:
    """Two-sided p-value of "both models are equally good", by flipping the signs of whole clusters.

    If the two were interchangeable, the sum of the differences over an image might as well have had the other sign: p is the
    share of all sign assignments that give a total at least as far from 0 (R. A. Fisher, The Design of Experiments, 1935).
    Where every image has one question that is right or wrong, this is McNemar's exact test. Totals of whole numbers are
    counted exactly; of others FLIPS assignments are drawn.

    Args:
        differences: second score less the first, one a question.
        clusters: the image of each; as many.
    """
    if not any(differences):
        return 1.0
    sums, _ = _by_cluster(differences, clusters)
    sums = sums[np.abs(sums) > 1e-9]
    if not len(sums):
        return 1.0
    whole = np.rint(sums)
    if np.abs(sums - whole).max() < 1e-9:
        return _counted_flips(whole.astype(int).tolist())
    return _drawn_flips(sums, seed)


def _counted_flips(sums: Sequence[int]) -> float:
    """Share of all sign assignments with a total as far from 0 as that of `sums`, from the distribution of the total."""
    chances = np.ones(1)
    for size, count in Counter(map(abs, sums)).items():
        # of `count` clusters of one size, k are positive: their total is size * (2 k - count)
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = _binomial(count)
        chances = np.convolve(chances, spaced)
    reach = len(chances) // 2  # totals go from -reach to reach
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(sum(sums))
    return min(1.0, float(chances[far].sum()))


def _binomial(count: int) -> NDArray[np.float64]:
    """Chances of 0 to `count` heads in as many fair throws; by logarithms, as coefficients of a thousand overflow."""
    steps = np.log(np.arange(count, 0, -1)) - np.log(np.arange(1, count + 1))
    return np.exp(np.concatenate([[0.0], np.cumsum(steps)]) - count * np.log(2))


def _drawn_flips(sums: NDArray[np.float64], seed: int) -> float:
    generator = np.random.default_rng(seed)
    wanted, far = abs(sums.sum()) - 1e-9, 0
    rows = max(1, _CHUNK // len(sums))
    for first in range(0, FLIPS, rows):
        signs = generator.integers(0, 2, size=(min(rows, FLIPS - first), len(sums)), dtype=np.int8)
        far += int((np.abs((2 * signs - 1) @ sums) >= wanted).sum())
    return (far + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (S. Holm, Scandinavian Journal of Statistics 6, 1979), in the same order.

    If those below 5 % are called real, the chance of calling any that is not is at most 5 %, whatever they depend on.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _members(clusters: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    return list(members.values())


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) sums and counts of the values of each cluster."""
    members = _members(clusters)
    table = np.asarray(values, dtype=np.float64)
    return np.array([table[m].sum() for m in members]), np.array([len(m) for m in members], dtype=np.float64)


def _draws(clusters: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """DRAWS rows of cluster indices, in chunks that fit memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // clusters)
    for first in range(0, DRAWS, rows):
        yield generator.integers(0, clusters, size=(min(rows, DRAWS - first), clusters), dtype=np.int64)
