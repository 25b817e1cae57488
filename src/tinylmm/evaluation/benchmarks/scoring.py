"""What every scorer shares: the choice of a variant, counts, and metrics with what they rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Basis, Item, ItemScore


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


Graded = Sequence[tuple[Item, float]]
"""Items with their scores in [0, 1]."""


class Metrics:
    """Collects metrics in order, each with what it rests on; `aggregate` and `bases` are those of `Scores`."""

    def __init__(self, digits: int | None = 2) -> None:
        """Args: digits: decimals of percentages, as the official scorer prints them; None: all."""
        self.digits = digits
        self.aggregate: dict[str, float] = {}
        self.bases: dict[str, Basis] = {}

    def mean(self, name: str, rows: Iterable[tuple[Item, float]], grouped: bool = False) -> None:
        """100 times the mean score of `rows`; `grouped` where a row stands for a group of questions."""
        listed = list(rows)
        values = tuple(score for _, score in listed)
        self.aggregate[name] = percent(values, self.digits)
        self.bases[name] = Basis(tuple(item.item_id for item, _ in listed), values, grouped)

    def means_by(
        self, label: str, rows: Graded, group: Callable[[Item], str], grouped: bool = False, ordered: bool = False
    ) -> None:
        """`label/group` for each group, in the order in which groups first occur, or sorted; an empty name is none."""
        groups: dict[str, list[tuple[Item, float]]] = {}
        for item, score in rows:
            name = group(item)
            if name:
                groups.setdefault(name, []).append((item, score))
        for name in sorted(groups) if ordered else groups:
            self.mean(f"{label}/{name}", groups[name], grouped)

    def other(self, name: str, value: float, items: Iterable[Item], top: float | None = 100.0) -> None:
        """A metric that is no mean over questions, on a scale from 0 to `top`."""
        self.aggregate[name] = value
        self.bases[name] = Basis(tuple(item.item_id for item in items), top=top)


def graded(items: Sequence[Item], rows: Sequence[ItemScore]) -> list[tuple[Item, float]]:
    """Items that have a score, with it."""
    return [(item, row.score) for item, row in zip(items, rows, strict=True) if row.score is not None]


def percent(values: Iterable[float], digits: int | None = 2) -> float:
    """100 times the mean, rounded to `digits` decimals as the official scorers print it (None: not at all); 0 of nothing."""
    listed = list(values)
    mean = 100 * sum(listed) / len(listed) if listed else 0.0
    return mean if digits is None else round(mean, digits)
