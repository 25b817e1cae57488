"""What every scorer shares: the choice of a variant, counts, percentages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Item, ItemScore


def pick_variant(benchmark: Benchmark, variant: str | None) -> str:
    """Return `variant`, or the benchmark's default for None.

    Raises:
        ConfigError: the benchmark has no such variant; the message lists those it has.
    """
    if variant is None:
        return benchmark.variants[0]
    if variant not in benchmark.variants:
        hint = suggestion(variant, benchmark.variants)
        allowed = f"{benchmark.name} has {', '.join(benchmark.variants)}."
        raise ConfigError([Fault("variant", f"'{variant}' is unknown. {hint}".rstrip(), allowed)])
    return variant


def count_items(
    items: Sequence[Item], answers: Mapping[str, Answer], per_item: Sequence[ItemScore], **more: int
) -> dict[str, int]:
    """Return the counts of `Scores`: every item is `scored`, `missing` or (not judged yet) neither.

    `scored`: answered, and with a score. `missing`: without an answer; it scores 0 all the same. `unparsed`: answered, but
    with `parsed` None; a part of `scored`.
    """
    answered = [item.item_id in answers for item in items]
    rows = list(zip(answered, per_item, strict=True))
    return {
        "scored": sum(given and row.score is not None for given, row in rows),
        "missing": answered.count(False),
        "unparsed": sum(given and row.score is not None and row.parsed is None for given, row in rows),
        **more,
    }


def percent_by(label: str, groups: Iterable[str], scores: Iterable[float], digits: int | None = 2) -> dict[str, float]:
    """`label/group` -> `percent` of the scores of each group, in the order in which groups first occur.

    Args:
        label: what the groups are.
        groups: of each score; an empty name is none.
        scores: in [0, 1], as many.
    """
    grouped: dict[str, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        if group:
            grouped.setdefault(group, []).append(score)
    return {f"{label}/{group}": percent(within, digits) for group, within in grouped.items()}


def percent(values: Iterable[float], digits: int | None = 2) -> float:
    """100 times the mean, rounded to `digits` decimals as the official scorers print it (None: not at all); 0 of nothing."""
    listed = list(values)
    mean = 100 * sum(listed) / len(listed) if listed else 0.0
    return mean if digits is None else round(mean, digits)
