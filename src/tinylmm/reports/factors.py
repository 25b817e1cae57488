"""What varies between the runs of a sweep, from their specs: its factors, with short names of their values. No torch.

A named group (LLM, vision tower, connector, recipe, data) varies where its name does; any other field is a factor of its own
only where the factors found so far do not settle it. So a learning rate that an LLM brings along is none, and one that was
swept is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tinylmm.config.video import SamplingSpec
from tinylmm.reports.wording import ABSENT, GROUP_TITLES, facts

SEED = "seed"
NO_FACTORS = ("name", "store", "launch", "tracking", "trust", "eval", SEED)
"""Fields of a spec that decide no result, and those that have a place of their own: protocols say what `eval` does."""

SAMPLING = "video.sampling"
"""Several fields that say one thing: which frames."""

Flat = dict[str, Any]


@dataclass(frozen=True)
class Factor:
    """One thing that varies.

    Attributes:
        key: in the spec, as one would type it: `llm`, `recipe.stages.finetune.lr`.
        title: short, and different from every other factor's.
        levels: its values in words; numbers ascending, all else in the order of the runs.
        values: the level of each run.
    """

    key: str
    title: str
    levels: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Factors:
    """What tells the runs of a report apart, and what does not.

    Attributes:
        varying: the factors, seed excepted.
        seeds: of each run.
        constant: (title, value) of each group that is the same everywhere.
        along: (key, title of the factor that settles it) of fields that change with a factor without belonging to it.
    """

    varying: tuple[Factor, ...]
    seeds: tuple[str, ...]
    constant: tuple[tuple[str, str], ...]
    along: tuple[tuple[str, str], ...]

    @property
    def tell(self) -> bool:
        """Whether anything varies."""
        return bool(self.varying) or len(set(self.seeds)) > 1

    def cell_of(self, run: int) -> tuple[str, ...]:
        """The levels of a run, seed excepted."""
        return tuple(factor.values[run] for factor in self.varying)

    def lines(self) -> list[str]:
        """Sentences to stand above a table: what is the same everywhere, and what changes along with a factor."""
        said = [f"The same in all runs: {', '.join(f'{title} {value}' for title, value in self.constant)}."]
        for title in dict.fromkeys(title for _, title in self.along):
            keys = [key for key, settles in self.along if settles == title]
            said.append(f"Changes with {title}: {', '.join(keys)}.")
        return said if self.constant else said[1:]


def find_factors(specs: Sequence[Mapping[str, Any]]) -> Factors:
    """Find what varies between runs.

    Args:
        specs: of the runs, as their records hold them (plain JSON); at least one.
    """
    flat = [_flat(spec) for spec in specs]
    seeds = tuple(str(spec.get(SEED, ABSENT)) for spec in specs)
    groups = [group for group in GROUP_TITLES if len({_name(spec, group) for spec in specs}) > 1]
    columns: dict[str, list[Any]] = {group: [_name(spec, group) for spec in specs] for group in groups}
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if _varies(key, flat)]
    options = [key for key in keys if not _names_group(key)]
    for key in options:
        found = [one.get(key) for one in flat]
        if not _settled(found, [*columns.values(), list(seeds)]):
            columns[key] = found
    titles = _titles(list(columns))
    varying = _merged([_factor(key, titles[key], values) for key, values in columns.items()])
    same = [titled for titled, key in zip(facts(specs[0]), [*GROUP_TITLES, SEED], strict=True) if key not in columns]
    constant = tuple(fact for fact in same if fact[1] != ABSENT and (fact[0] != "Seed" or len(set(seeds)) == 1))
    return Factors(varying, seeds, constant, tuple(_along(options, flat, columns, titles)))


def _name(spec: Mapping[str, Any], group: str) -> str:
    return str((spec.get(group) or {}).get("name", ABSENT))


def _flat(spec: Mapping[str, Any]) -> Flat:
    return {key: value for group in spec if group not in NO_FACTORS for key, value in _leaves(group, spec[group])}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if key == SAMPLING and value:
        yield key, SamplingSpec.model_validate(value).in_words
    elif isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def _varies(key: str, flat: Sequence[Flat]) -> bool:
    return len({repr(one.get(key)) for one in flat}) > 1


def _names_group(key: str) -> bool:
    group, _, rest = key.partition(".")
    return group in GROUP_TITLES and rest == "name"


def _settled(values: Sequence[Any], columns: Sequence[Sequence[Any]]) -> bool:
    """Whether runs that agree in all columns agree in this, too."""
    seen: dict[str, str] = {}
    rows = zip(*columns, strict=True)
    return all(seen.setdefault(repr(row), repr(value)) == repr(value) for row, value in zip(rows, values, strict=True))


def _along(
    options: Sequence[str], flat: Sequence[Flat], columns: Mapping[str, Sequence[Any]], titles: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Fields that one factor settles and that are not part of its own definition."""
    for key in options:
        if key in columns:
            continue
        values = [one.get(key) for one in flat]
        settling = [name for name, column in columns.items() if _settled(values, [column])]
        if settling and key.partition(".")[0] not in settling:
            yield key, titles[settling[0]]


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Make one factor of two where one settles the other: a recipe that brings its data, a depth that one connector has.

    Nothing in the runs says which of the two a difference comes from, and as two they would have no matched cells.
    """
    for one, other in combinations(factors, 2):
        if _settled(one.values, [other.values]) or _settled(other.values, [one.values]):
            rest = [factor for factor in factors if factor is not other]
            return _merged([_pair(one, other) if factor is one else factor for factor in rest])
    return tuple(factors)


def _pair(first: Factor, second: Factor) -> Factor:
    both = sorted(
        set(zip(first.values, second.values, strict=True)),
        key=lambda pair: (first.levels.index(pair[0]), second.levels.index(pair[1])),
    )
    labels = {pair: " + ".join(part for part in pair if part != ABSENT) or ABSENT for pair in both}
    values = tuple(labels[pair] for pair in zip(first.values, second.values, strict=True))
    return Factor(f"{first.key} + {second.key}", f"{first.title} + {second.title}", tuple(labels.values()), values)


def _titles(keys: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each key that is its own; groups by their titles."""
    titles = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        clash = {tail: [o for o in (*keys, SEED) if o == tail or o.endswith(f".{tail}")] for tail in tails}
        titles[key] = GROUP_TITLES.get(key) or next(tail for tail, found in clash.items() if found == [key])
    return titles


def _factor(key: str, title: str, values: Sequence[Any]) -> Factor:
    distinct = list({repr(value): value for value in values}.values())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        distinct.sort()
    labels = dict(zip(map(repr, distinct), _labels(distinct), strict=True))
    return Factor(key, title, tuple(labels.values()), tuple(labels[repr(value)] for value in values))


def _labels(values: Sequence[Any]) -> list[str]:
    """Values in words; of paths and dotted names the last part, where that tells them apart."""
    whole = [_word(value) for value in values]
    for separator in ("/", "."):
        texts = [value.rsplit(separator, 1)[-1] if isinstance(value, str) else _word(value) for value in values]
        tells = all(texts) and len(set(texts)) == len(texts) and any(separator in str(value) for value in values)
        if tells and all(isinstance(value, str | None) for value in values):
            return texts
    short = [f"{value:.4g}" if isinstance(value, float) else word for value, word in zip(values, whole, strict=True)]
    return short if len(set(short)) == len(set(whole)) else whole


def _word(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
