"""Which questions a limited evaluation asks: whole groups, from every category, the same for a seed. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item


def sampled(benchmark: Benchmark, items: Sequence[Item], limit: int | None, seed: int = 0) -> list[Item]:
    """At most `limit` of the items, in the order of the question file; all of them for None.

    Questions that are scored together (`Benchmark.group_of`) are kept or left out together; the first group is kept even
    where it alone is larger than `limit`. Every category has its share, and one group at least as long as there is room, so
    small categories weigh a little more than among all questions. A group's place in the draw depends on the seed and its
    own name only.
    """
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(benchmark.group_of(item), []).append(item)
    kept: set[str] = set()
    asked = 0
    for name in _order(groups, seed):
        if kept and asked + len(groups[name]) > limit:
            break
        kept.add(name)
        asked += len(groups[name])
    return [item for item in items if benchmark.group_of(item) in kept]


def _order(groups: dict[str, list[Item]], seed: int) -> list[str]:
    """Names of the groups such that any beginning holds every category in proportion, one of each first."""
    categories: dict[str, list[str]] = {}
    for name, members in groups.items():
        categories.setdefault(members[0].category, []).append(name)
    places: dict[str, tuple[float, str]] = {}
    for names in categories.values():
        drawn = sorted(names, key=lambda name: _draw(seed, name))
        for number, name in enumerate(drawn):
            places[name] = (number and (number + 0.5) / len(drawn), _draw(seed, name))
    return sorted(places, key=places.__getitem__)


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
