"""From answers to the rows of scores.json: each metric with its interval, its blind baseline and chance. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Basis, Item, Scores
from tinylmm.evaluation.images import cluster_of, content_keys
from tinylmm.evaluation.statistics import Interval, half_samples, interval_on_scale, mean_interval, paired_p_value

MANY_ITEMS = 20_000
FEW_HALVES = 60
"""Halves drawn of a benchmark with more than MANY_ITEMS questions: each is scored anew."""


def score_rows(
    benchmark: Benchmark,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    scores: Scores,
    blind: Scores | None,
    keys: Mapping[str, str] | None = None,
    judged: bool = False,
) -> list[dict[str, Any]]:
    """One row a metric, the headline first, then in the benchmark's order.

    Args:
        keys: which images are the same, as `content_keys` finds them; by default it is asked.
        judged: a judge took part in the scores. It is not asked again hundreds of times for an interval, so metrics that
            are no means over questions have one only where the grades that it gave suffice (`Benchmark.regraded`).

    Returns:
        `{"metric", "value", "blind", "blind_p", "chance", "count", "top", "interval", "interval_by"}`; value, blind, chance and
        interval (`[low, high]` at 95 %, never outside the metric's scale) in the metric's own unit; None where there is none.
        `count` is how many questions, or groups that are scored as one, the metric rests on, `top` the end of its scale.
        `blind_p` is the p-value of "as good without the image", by flipping images. `interval_by` is `bootstrap` for means
        over questions, `wilson` where their grades are all equal, and `half-samples` for all else.
    """
    keys = content_keys(items) if keys is None else keys
    clusters = {item.item_id: cluster_of(item, keys) for item in items}
    names = sorted(scores.aggregate, key=lambda name: name != benchmark.headline)
    bases = {name: _basis(name, scores, items) for name in names}
    blind_bases = {} if blind is None else {name: _basis(name, blind, items) for name in blind.aggregate}
    others = [name for name in names if bases[name].values is None]
    judged = judged or benchmark.judged
    errors = _errors(benchmark, items, answers, scores, others, clusters, judged)
    options = {item.item_id: item.options for item in items}
    rows = []
    for name in names:
        basis = bases[name]
        interval, by = _interval(basis, scores.aggregate[name], errors.get(name), clusters)
        rows.append(
            {
                "metric": name,
                "value": scores.aggregate[name],
                "blind": None if blind is None else blind.aggregate.get(name),
                "blind_p": _blind_p(basis, blind_bases.get(name), clusters),
                "chance": _chance(basis, options),
                "count": len(basis.items),
                "top": basis.top,
                "interval": None if interval is None else [round(end, 4) for end in interval],
                "interval_by": by,
            }
        )
    return rows


def _basis(name: str, scores: Scores, items: Sequence[Item]) -> Basis:
    """What a metric rests on, as the benchmark says.

    Of a benchmark of one's own that does not say: all questions with a score, or those of the category that the name holds;
    the metric is taken for their mean where it is that, up to rounding, and its scale is not known.
    """
    if name in scores.bases:
        return scores.bases[name]
    values = {row.item_id: row.score for row in scores.per_item}
    scored = [item for item in items if values.get(item.item_id) is not None]
    value = scores.aggregate[name]
    rounding = 0.051 if round(value, 1) == value else 0.0051  # official scorers print one decimal, or two
    named = [item for item in scored if item.category and f"/{item.category}/" in f"/{name}/"]
    for subset in ([named] if named else []) + [scored]:
        grades = tuple(values[item.item_id] or 0.0 for item in subset)
        if grades and abs(100 * sum(grades) / len(grades) - value) < rounding:
            return Basis(tuple(item.item_id for item in subset), grades)
    return Basis(tuple(item.item_id for item in named or scored), top=None)


def _interval(
    basis: Basis, value: float, error: float | None, clusters: Mapping[str, str]
) -> tuple[Interval | None, str | None]:
    images = [clusters[item_id] for item_id in basis.items]
    if basis.values:
        interval, by = mean_interval(basis.values, images)
        return (100 * interval[0], 100 * interval[1]), by
    if error is None or not images or (basis.top is None and error == 0):
        return None, None
    return interval_on_scale(value, error, len(set(images)), basis.top), "half-samples"


def _blind_p(basis: Basis, blind: Basis | None, clusters: Mapping[str, str]) -> float | None:
    """p-value of "as good without the image", over the units that were scored both ways."""
    if blind is None or not basis.values or not blind.values:
        return None
    unseen = dict(zip(blind.items, blind.values, strict=True))
    both = [
        (seen - unseen[name], clusters[name])
        for name, seen in zip(basis.items, basis.values, strict=True)
        if name in unseen
    ]
    return paired_p_value([difference for difference, _ in both], [cluster for _, cluster in both])


def _chance(basis: Basis, options: Mapping[str, int]) -> float | None:
    """What a uniform guess among each question's options scores, in %; None for open questions, groups, and other metrics."""
    found = [options[item_id] for item_id in basis.items]
    if basis.values is None or basis.grouped or not found or min(found) <= 0:
        return None
    return round(100 * sum(1 / count for count in found) / len(found), 4)


def _errors(
    benchmark: Benchmark,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    scores: Scores,
    names: Sequence[str],
    clusters: Mapping[str, str],
    judged: bool,
) -> dict[str, float]:
    """Standard errors of metrics that are no means: of each half of the images the metrics, from its grades or scored anew."""
    kept = benchmark.regraded(items, scores.per_item) is not None
    if not names or (judged and not kept):
        return {}

    def metrics(chosen: Sequence[int]) -> Mapping[str, float]:
        if kept:
            rows = [scores.per_item[index] for index in chosen]
            return benchmark.regraded([items[index] for index in chosen], rows) or {}
        return benchmark.score([items[index] for index in chosen], answers_of(chosen), scores.variant).aggregate

    def answers_of(chosen: Sequence[int]) -> dict[str, Answer]:
        ids = [items[index].item_id for index in chosen]
        return {item_id: answers[item_id] for item_id in ids if item_id in answers}

    halves = {"halves": FEW_HALVES} if len(items) > MANY_ITEMS else {}
    return half_samples(metrics, [clusters[item.item_id] for item in items], names, **halves)
