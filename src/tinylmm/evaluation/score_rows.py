"""From answers to the rows of scores.json: each metric with its interval, its blind baseline and chance. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Item, Scores
from tinylmm.evaluation.images import cluster_of, content_keys
from tinylmm.evaluation.statistics import bootstrap_mean, half_samples

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
            are no means over questions have none.

    Returns:
        `{"metric", "value", "blind", "chance", "count", "interval", "interval_by"}`; value, blind, chance and interval
        (`[low, high]` at 95 %) in the metric's own unit; blind, chance and interval are None where there is none.
        `interval_by` is `bootstrap` for means over questions and `half-samples` for all else.
    """
    keys = content_keys(items) if keys is None else keys
    clusters = {item.item_id: cluster_of(item, keys) for item in items}
    names = sorted(scores.aggregate, key=lambda name: name != benchmark.headline)
    values = {row.item_id: row.score for row in scores.per_item}
    means = {name: _mean_over(name, scores.aggregate[name], items, values) for name in names}
    others = [name for name in names if means[name] is None]
    judged = judged or benchmark.judged
    halves = {} if judged else _halves(benchmark, items, answers, scores, others, clusters)
    rows = []
    for name in names:
        subset = means[name]
        if subset is None:
            interval, by = halves.get(name), "half-samples"
        else:
            scored = [values[item.item_id] or 0.0 for item in subset]
            interval, by = bootstrap_mean(scored, [clusters[item.item_id] for item in subset]), "bootstrap"
            interval = None if interval is None else (100 * interval[0], 100 * interval[1])
        rows.append(
            {
                "metric": name,
                "value": scores.aggregate[name],
                "blind": None if blind is None else blind.aggregate.get(name),
                "chance": _chance(subset),
                "count": len(_category_of(name, items) or items) if subset is None else len(subset),
                "interval": None if interval is None else [round(end, 4) for end in interval],
                "interval_by": None if interval is None else by,
            }
        )
    return rows


def _mean_over(name: str, value: float, items: Sequence[Item], values: Mapping[str, float | None]) -> list[Item] | None:
    """The items of which this metric is 100 times the mean score: all, or those of the category that its name holds."""
    rounding = 0.051 if round(value, 1) == value else 0.0051  # official scorers print one decimal, or two
    scored = [item for item in items if values.get(item.item_id) is not None]
    subsets = [scored, _category_of(name, scored)]
    for subset in subsets[::-1] if subsets[1] else subsets[:1]:
        mean = 100 * sum(values[item.item_id] or 0.0 for item in subset) / len(subset) if subset else None
        if mean is not None and abs(mean - value) < rounding:
            return subset
    return None


def _category_of(name: str, items: Sequence[Item]) -> list[Item]:
    """The items of the category that a metric's name holds (`accuracy/digit`, `adversarial/f1`), if it holds one."""
    return [item for item in items if item.category and f"/{item.category}/" in f"/{name}/"]


def _chance(items: Sequence[Item] | None) -> float | None:
    """What a uniform guess among each question's options scores, in %; None if a question is open."""
    if not items or any(item.options <= 0 for item in items):
        return None
    return round(100 * sum(1 / item.options for item in items) / len(items), 4)


def _halves(
    benchmark: Benchmark,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    scores: Scores,
    names: Sequence[str],
    clusters: Mapping[str, str],
) -> dict[str, tuple[float, float]]:
    if not names:
        return {}

    def metrics(chosen: Sequence[int]) -> Mapping[str, float]:
        return benchmark.score([items[index] for index in chosen], answers_of(chosen), scores.variant).aggregate

    def answers_of(chosen: Sequence[int]) -> dict[str, Answer]:
        ids = [items[index].item_id for index in chosen]
        return {item_id: answers[item_id] for item_id in ids if item_id in answers}

    halves = {"halves": FEW_HALVES} if len(items) > MANY_ITEMS else {}
    whole = {name: scores.aggregate[name] for name in names}
    return half_samples(metrics, [clusters[item.item_id] for item in items], whole, **halves)
