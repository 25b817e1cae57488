"""What a sweep says: which cells are told apart, what a factor adds, whether two factors depend on each other. No torch.

An effect is a difference over matched cells: of every combination of the other factors that has both levels, the one less the
other, averaged. All p-values of a family (pairs of cells; effects and interactions) are corrected together (Holm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from string import ascii_lowercase

from tinylmm.evaluation.statistics import SURE, holm
from tinylmm.reports.doubt import Estimate, difference_of, groups_alike, needed
from tinylmm.reports.records import Report
from tinylmm.reports.study import Column, Study, study_of
from tinylmm.reports.wording import points

ALL_PAIRS = 4
"""Levels up to which each is compared with each; of more, each with the first."""
MAX_POWER_LINES = 5


@dataclass(frozen=True)
class Contrast:
    """A difference between cells of one column.

    Attributes:
        column: the figure.
        what: the factor, or the two whose interaction it is; empty for a pair of cells.
        levels: from which level to which; of an interaction of both factors.
        matched: over how many combinations of the other factors it is averaged.
        found: the difference.
        cells: the two cells of a pair.
        corrected: p-value for all `comparisons` of its family.
    """

    column: Column
    what: tuple[str, ...]
    levels: tuple[tuple[str, str], ...]
    matched: int
    found: Estimate
    cells: tuple[int, int] = (-1, -1)
    corrected: float = 1.0
    comparisons: int = 1

    @property
    def clear(self) -> bool:
        """Whether it is beyond chance, all comparisons counted; where seeds are not known, of questions alone."""
        return self.corrected < SURE

    @property
    def change(self) -> str:
        """From what to what, in words."""
        return " × ".join(f"{one} → {other}" for one, other in self.levels)


@dataclass(frozen=True)
class Findings:
    """A study with everything that is compared in it."""

    study: Study
    pairs: tuple[Contrast, ...]
    effects: tuple[Contrast, ...]
    interactions: tuple[Contrast, ...]

    def letters(self, column: Column) -> dict[int, str]:
        """Cell -> letters; cells that share one cannot be told apart."""
        place = {cell: number for number, cell in enumerate(column.order)}
        own = [pair for pair in self.pairs if pair.column is column]
        apart = [(place[one], place[other]) for one, other in (pair.cells for pair in own if pair.clear)]
        groups = groups_alike(len(column.order), apart)
        letters = [ascii_lowercase[number % 26] * (number // 26 + 1) for number in range(len(groups))]
        return {
            cell: "".join(letter for letter, group in zip(letters, groups, strict=True) if place[cell] in group)
            for cell in column.order
        }

    def power_lines(self, column: Column) -> list[str]:
        """Of neighbours in the ranking that are not told apart, how many seeds or questions would do that."""
        own = {pair.cells: pair for pair in self.pairs if pair.column is column and not pair.clear}
        neighbours = list(zip(column.order[1:], column.order, strict=False))
        found = [own[pair] for pair in neighbours if pair in own]
        return [_power_line(self.study, pair) for pair in found[:MAX_POWER_LINES]]


def findings_of(report: Report) -> Findings | None:
    """Sort a report's runs into a study and compare the cells of every column; None where nothing tells the runs apart."""
    study = study_of(report)
    if study is None:
        return None
    pairs = [pair for column in study.columns for pair in _pairs(column)]
    effects = [effect for column in study.columns for effect in _effects(study, column)]
    both = [effect for column in study.columns for effect in _interactions(study, column)]
    corrected, split = _corrected([*effects, *both]), len(effects)
    return Findings(study, tuple(_corrected(pairs)), tuple(corrected[:split]), tuple(corrected[split:]))


def _corrected(contrasts: Sequence[Contrast]) -> list[Contrast]:
    values = holm([contrast.found.p_value for contrast in contrasts])
    return [replace(c, corrected=value, comparisons=len(values)) for c, value in zip(contrasts, values, strict=True)]


def _pairs(column: Column) -> Iterator[Contrast]:
    """Each cell with each better one: from the worse to the better."""
    for better, worse in combinations(column.order, 2):
        found = difference_of(column.runs, {worse: -1.0, better: 1.0})
        yield Contrast(column, (), (), 1, found, (worse, better))


def _level_pairs(levels: Sequence[str]) -> list[tuple[str, str]]:
    if len(levels) <= ALL_PAIRS:
        return list(combinations(levels, 2))
    return [(levels[0], other) for other in levels[1:]]


def _effects(study: Study, column: Column) -> Iterator[Contrast]:
    by_levels = {study.cells[cell].levels: cell for cell in column.cells}
    for place, factor in enumerate(study.factors.varying):
        for one, other in _level_pairs(factor.levels):
            weights: dict[int, float] = {}
            for levels, cell in by_levels.items():
                partner = by_levels.get(_with(levels, {place: other}))
                if levels[place] == one and partner is not None:
                    weights |= {cell: -1.0, partner: 1.0}
            if weights:
                yield _contrast(column, (factor.title,), ((one, other),), weights, 2)


def _interactions(study: Study, column: Column) -> Iterator[Contrast]:
    by_levels = {study.cells[cell].levels: cell for cell in column.cells}
    for (i, first), (j, second) in combinations(enumerate(study.factors.varying), 2):
        for a, b in _level_pairs(first.levels):
            for c, d in _level_pairs(second.levels):
                weights: dict[int, float] = {}
                for levels in by_levels:
                    if (levels[i], levels[j]) != (a, c):
                        continue
                    corners = [_with(levels, {i: x, j: y}) for x, y in ((a, c), (b, c), (a, d), (b, d))]
                    if all(corner in by_levels for corner in corners):
                        weights |= {by_levels[corner]: s for corner, s in zip(corners, (1.0, -1, -1, 1), strict=True)}
                if weights:
                    yield _contrast(column, (first.title, second.title), ((a, b), (c, d)), weights, 4)


def _with(levels: tuple[str, ...], change: dict[int, str]) -> tuple[str, ...]:
    return tuple(change.get(place, level) for place, level in enumerate(levels))


def _contrast(
    column: Column, what: tuple[str, ...], levels: tuple[tuple[str, str], ...], weights: dict[int, float], corners: int
) -> Contrast:
    matched = len(weights) // corners
    shares = {cell: weight / matched for cell, weight in weights.items()}
    return Contrast(column, what, levels, matched, difference_of(column.runs, shares))


def _power_line(study: Study, pair: Contrast) -> str:
    worse, better = pair.cells
    found, wanted = pair.found, needed(pair.found)
    what = f"{study.label(better)} over {study.label(worse)}: {points(found.value)} ({_span(found)})"
    if found.value == 0:
        return f"{what}; no number of seeds or questions tells equals apart."
    ways = []
    if wanted.seeds is not None:
        ways.append(f"{wanted.seeds} seeds each")
    if wanted.questions is not None:
        ways.append(f"{wanted.questions:.3g} times the questions")
    if not found.seeds_known:
        reached = f"; over questions alone it takes {ways[-1]}" if ways else ""
        return f"{what}; the seed noise is not known, so run at least two seeds of each{reached}."
    if not ways:
        return f"{what}; were it real, neither more seeds nor more questions alone would show it: take more of both."
    return f"{what}; were it real, {' or '.join(ways)} would show it in four of five tries."


def _span(found: Estimate) -> str:
    return f"{points(found.interval[0])} to {points(found.interval[1])}"
