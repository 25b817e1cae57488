"""Which prompts are computed in which fixed shape, and which are answered together (`fixed.py` says why)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.generation.cache import CacheKind
from tinylmm.generation.fixed_cache import Shape
from tinylmm.generation.fixed_step import CHUNK
from tinylmm.generation.prompts import Prompt

GROUPS, GROUP = 16, 4
"""Groups of a shape where there is room for them, and rows of a group. Four rows a group leave few idle with one question an
image, and read its prefix five times for 20; the weights are read 16 groups at a time."""
COLUMNS = 64
"""Lengths are multiples of this: those of shared prefixes are rounded down, those of a row's own up."""
LONG, LONG_COLUMNS = 512, 256
"""From so many own columns on, they are multiples of the other number, so that there are few shapes."""


@dataclass(frozen=True)
class Granules:
    """What lengths are rounded to; other values are for tests with short prompts."""

    groups: int = GROUPS
    rows: int = GROUP
    columns: int = COLUMNS


@dataclass(frozen=True)
class Unit:
    """Prompts for one group of rows: they begin alike, up to the last image token."""

    prefix: tuple[int, ...]
    prompts: tuple[Prompt, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Keys of the prefix's images."""
        return self.prompts[0].images


@dataclass(frozen=True)
class Batch:
    """Units that are answered together, by rows of one shape."""

    shape: Shape
    units: tuple[Unit, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """All their prompts, in order."""
        return [prompt for unit in self.units for prompt in unit.prompts]

    @property
    def images(self) -> list[str]:
        """Keys of all their images, each once."""
        return list(dict.fromkeys(key for unit in self.units for key in unit.images))


def begins(prompt: Prompt) -> int:
    """Length of a prompt's prefix: up to its last image token, 0 where it has no image."""
    return len(prompt.ids) - prompt.ids[::-1].index(IMAGE_TOKEN_ID) if prompt.images else 0


@dataclass(frozen=True)
class Planner:
    """Plans for one kind of model.

    Attributes:
        tokens: most places for tokens that the cache of a shape has.
    """

    kind: CacheKind
    tokens: int
    granules: Granules

    def shape_for(self, prompt: Prompt, limit: int) -> Shape | None:
        """The shape that a prompt is computed in; None where it needs another way."""
        past, size = begins(prompt), self.granules.columns
        longest = len(prompt.ids) + limit
        if past == len(prompt.ids) or (self.kind.long_from is not None and longest > self.kind.long_from):
            return None
        shared = past // size * size
        needed = len(prompt.ids) - shared + max(limit, CHUNK) + 1  # padding writes into a column of its own
        step = size if needed <= LONG else LONG_COLUMNS
        own, groups = -(-needed // step) * step, self.granules.groups
        while groups > 1 and groups * (shared + self.granules.rows * own) > self.tokens:
            groups //= 2
        shape = Shape(groups, self.granules.rows, shared, own)
        return shape if shape.tokens <= self.tokens else None

    def plan(
        self, prompts: Sequence[Prompt], limit: Callable[[Prompt], int], rows: int, share: bool = True
    ) -> tuple[list[Batch], list[Prompt]]:
        """Batches, and the prompts that need another way.

        Args:
            limit: most new tokens of a prompt.
            rows: most prompts in a batch.
            share: whether prompts may stand behind one copy of a prefix.
        """
        by_shape: dict[Shape, dict[tuple[object, ...], list[Prompt]]] = {}
        rest: list[Prompt] = []
        for prompt in prompts:
            shape = self.shape_for(prompt, limit(prompt))
            if shape is None:
                rest.append(prompt)
                continue
            key = (prompt.ids[: begins(prompt)], prompt.images, None if share else prompt.item_id)
            by_shape.setdefault(shape, {}).setdefault(key, []).append(prompt)
        batches = []
        for shape in sorted(by_shape, key=lambda shape: -shape.tokens):  # what does not fit shows at once
            units = [unit for same in by_shape[shape].values() for unit in _units(same, min(rows, shape.rows))]
            batches += [Batch(shape, some) for some in _batches(units, shape.groups, rows)]
        return batches, rest


def _units(prompts: Sequence[Prompt], most: int) -> Iterator[Unit]:
    for first in range(0, len(prompts), most):
        some = tuple(prompts[first : first + most])
        yield Unit(some[0].ids[: begins(some[0])], some)


def _batches(units: Sequence[Unit], groups: int, rows: int) -> Iterator[tuple[Unit, ...]]:
    """At most so many groups, and so many prompts, a batch."""
    batch: list[Unit] = []
    for unit in units:
        if batch and (len(batch) == groups or sum(len(u.prompts) for u in [*batch, unit]) > rows):
            yield tuple(batch)
            batch = []
        batch.append(unit)
    if batch:
        yield tuple(batch)
