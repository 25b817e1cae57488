"""How sure a score is: 95 % intervals by resampling images, and paired tests between two models. No torch.

Questions about one image are not independent, so whole images are drawn, with every question about them. Seeds are fixed:
the same answers always give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from math import exp, lgamma, log, sqrt

import numpy as np
from numpy.typing import NDArray

SEED = 20240519
DRAWS = 5000
HALVES = 200
Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
_CHUNK = 4_000_000

Interval = tuple[float, float]


def bootstrap_mean(values: Sequence[float], clusters: Sequence[Hashable], seed: int = SEED) -> Interval | None:
    """95 % percentile interval of the mean, drawing clusters with replacement (B. Efron, Annals of Statistics 7, 1979).

    Where all values are 0 or all are 1, resampling shows no spread; then Wilson's interval over the clusters is returned.

    Args:
        values: one a question.
        clusters: what each belongs to (its image); as many.

    Returns:
        (low, high), or None where there are no values.
    """
    if not values:
        return None
    if len(set(values)) == 1 and values[0] in (0.0, 1.0):
        return wilson(values[0], len(set(clusters)))
    sums, counts = _by_cluster(values, clusters)
    means = [sums[index].sum(1) / counts[index].sum(1) for index in _draws(len(sums), seed)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def half_samples(
    metrics: Callable[[Sequence[int]], Mapping[str, float]],
    clusters: Sequence[Hashable],
    whole: Mapping[str, float],
    halves: int = HALVES,
    seed: int = SEED,
) -> dict[str, Interval]:
    """95 % intervals of metrics of any kind, from how they vary between random halves of the clusters.

    A half drawn without replacement varies about the whole as the whole varies about the truth (the delete-half jackknife:
    J. Shao and C. F. J. Wu, Annals of Statistics 17, 1989). Unlike a bootstrap it never asks a scorer about an image twice,
    so it holds for scores that pair or group questions.

    Args:
        metrics: indices of questions, ascending -> the metrics of these questions alone.
        clusters: what each question belongs to.
        whole: the metrics of all questions; those that a half lacks, or that are the same in every half (where resampling
            has nothing to go by), get no interval.
    """
    members = _members(clusters)
    if len(members) < 4:
        return {}
    generator = np.random.default_rng(seed)
    seen: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(halves):
        chosen = generator.permutation(len(members))[: len(members) // 2]
        found = metrics(sorted(index for place in chosen for index in members[place]))
        for name in seen:
            if name in found:
                seen[name].append(found[name])
    spread = {name: float(np.std(values)) for name, values in seen.items() if len(values) == halves}
    # an odd number of clusters makes halves a little smaller, and their spread a little larger than need be
    return {name: (whole[name] - Z_95 * sd, whole[name] + Z_95 * sd) for name, sd in spread.items() if sd > 0}


def wilson(share: float, count: int) -> Interval:
    """95 % interval of a share in [0, 1] (E. B. Wilson, JASA 22, 1927)."""
    square = Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely a split as uneven as this is between two equally good models.

    Args:
        only_first, only_second: questions that only one of the two answered rightly.
    """
    flipped = only_first + only_second
    if flipped == 0:
        return 1.0
    # logarithms: of a thousand flips the binomial coefficients are beyond a float
    least = min(only_first, only_second)
    logs = [lgamma(flipped + 1) - lgamma(k + 1) - lgamma(flipped - k + 1) - flipped * log(2) for k in range(least + 1)]
    top = max(logs)
    return min(1.0, 2 * exp(top) * sum(exp(value - top) for value in logs))


def paired_p_value(differences: Sequence[float], clusters: Sequence[Hashable], seed: int = SEED) -> float:
    """Two-sided p-value of "the mean difference is 0", by a paired bootstrap over clusters (at least 1 / (DRAWS + 1))."""
    if not differences or not any(differences):
        return 1.0
    sums, _ = _by_cluster(differences, clusters)
    below = above = total = 0
    for index in _draws(len(sums), seed):
        drawn = sums[index].sum(1)
        below, above, total = below + int((drawn <= 0).sum()), above + int((drawn >= 0).sum()), total + len(drawn)
    return min(1.0, 2 * (min(below, above) + 1) / (total + 1))


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
