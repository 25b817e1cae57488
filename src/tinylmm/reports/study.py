"""A sweep as a table: cells of runs that differ in their seed alone, columns of figures that may be compared. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tinylmm.evaluation.protocol import Protocol, shared
from tinylmm.evaluation.statistics import Z_95
from tinylmm.reports.doubt import Estimate, Floats, Ints, Runs, mean_of
from tinylmm.reports.factors import Factors, find_factors
from tinylmm.reports.pairs import Key, by_name
from tinylmm.reports.published import Published, published_for
from tinylmm.reports.records import Evaluation, Report, RunReport, Score
from tinylmm.reports.stored import read_generations
from tinylmm.reports.wording import words

ROUNDING = 0.0501
"""Official scorers print one decimal: the mean over questions may be off by so much from the figure."""


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but their seed.

    Attributes:
        levels: of each factor.
        runs: places in the report, one a seed.
        seeds: of each.
    """

    levels: tuple[str, ...]
    runs: tuple[int, ...]
    seeds: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """One metric of one evaluation by one protocol, over all cells that have it.

    Attributes:
        name, metric: of the evaluation, and of the figure.
        protocol: by which all its figures were made (`shared`); `letter` tells it from other protocols of the same evaluation.
        cells: places of the cells that have it, the order of `runs.cells`.
        runs: the figures; cell numbers in it are places in the study.
        share: whether it is a share of right answers in %.
    """

    name: str
    metric: str
    protocol: Protocol | None
    letter: str
    cells: tuple[int, ...]
    runs: Runs
    share: bool

    @property
    def title(self) -> str:
        """What the column is called."""
        letter = f" {self.letter}" if self.letter else ""
        sample = " (sample)" if self.protocol and self.protocol.limited else ""
        return f"{words(self.name)} {words(self.metric)}{letter}{sample}"

    @cached_property
    def means(self) -> dict[int, Estimate]:
        """Cell -> its mean over seeds."""
        return {cell: mean_of(self.runs, cell) for cell in self.cells}

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Cells, the best first."""
        return tuple(sorted(self.cells, key=lambda cell: (-self.means[cell].value, cell)))

    def seed_noise(self, study: Study, cell: int) -> tuple[float, int] | None:
        """Standard deviation over seeds and the cell that it was seen in: this one, or the nearest that has two seeds."""
        known = [other for other in self.cells if len(self.runs.of_cell(other)) > 1]
        if not known:
            return None
        nearest = min(known, key=lambda other: (study.distance(cell, other), other))
        spread = self.runs.spread(nearest)
        return None if spread is None else (spread, nearest)


@dataclass(frozen=True)
class Study:
    """The runs of a report by what varies between them.

    Attributes:
        report: its runs.
        factors: what varies.
        cells: in the order of the factors' levels.
        columns: the headline of each evaluation, and figures that publications name.
        categories: further columns, of categories, where there is a single evaluation.
        notes: which runs are no part of it, and why.
    """

    report: Report
    factors: Factors
    cells: tuple[Cell, ...]
    columns: tuple[Column, ...]
    categories: tuple[Column, ...]
    notes: tuple[str, ...]

    def distance(self, one: int, other: int) -> int:
        """In how many factors two cells differ."""
        return sum(a != b for a, b in zip(self.cells[one].levels, self.cells[other].levels, strict=True))

    def label(self, cell: int) -> str:
        """A cell in words: its levels."""
        return " · ".join(self.cells[cell].levels) or "all runs"

    def runs_of(self, cell: int) -> list[RunReport]:
        """A cell's runs."""
        return [self.report.runs[place] for place in self.cells[cell].runs]

    def training_seconds(self, cell: int) -> float | None:
        """What the trainings of one of its models took, on average over seeds; reused ones as long as they once took."""
        spent = [[stage.seconds for stage in run.trainings_finished] for run in self.runs_of(cell)]
        sums = [sum(s for s in seconds if s is not None) for seconds in spent if seconds]
        return sum(sums) / len(sums) if sums else None

    def published(self, cell: int, column: Column) -> list[Published]:
        """What is published of a cell's parts and recipe, in this column's metric or in one that its source leaves open."""
        spec = self.runs_of(cell)[0].record.spec
        benchmark = column.protocol.benchmark if column.protocol else column.name
        return _published(spec, benchmark, column.metric)

    @cached_property
    def reuse(self) -> tuple[float, float]:
        """Seconds that all runs' stages would take one by one, and that were spent: each distinct stage once."""
        stages = [stage for run in self.report.runs for stage in run.stages if stage.finished]
        distinct = {stage.digest: stage.seconds or 0.0 for stage in stages}
        return sum(distinct[stage.digest] for stage in stages), sum(distinct.values())

    @property
    def reuse_line(self) -> str:
        """What sharing stages saved, in words."""
        asked, spent = self.reuse
        number = sum(stage.finished for run in self.report.runs for stage in run.stages)
        distinct = len({stage.digest for run in self.report.runs for stage in run.stages if stage.finished})
        return (
            f"These runs ask for {number} stages, {distinct} of them distinct. One by one they would take {_hours(asked)}; "
            f"they took {_hours(spent)}, so reuse saved {_hours(asked - spent)}."
        )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def study_of(report: Report) -> Study | None:
    """Sort the runs of a report into cells; None where nothing tells them apart."""
    if len(report.runs) < 2:
        return None
    factors = find_factors([run.record.spec for run in report.runs])
    if not factors.tell:
        return None
    cells, notes = _cells(report, factors)
    kept = [place for cell in cells for place in cell.runs]
    notes += [f"{run.name} has no scores." for run in report.runs if not run.evaluations]
    columns, categories = _columns(report, cells, kept)
    return Study(report, factors, cells, columns, categories, tuple(notes))


def _cells(report: Report, factors: Factors) -> tuple[tuple[Cell, ...], list[str]]:
    members: dict[tuple[str, ...], dict[str, int]] = {}
    notes = []
    for place in range(len(report.runs)):
        seeds = members.setdefault(factors.cell_of(place), {})
        seed = factors.seeds[place]
        if seed in seeds:  # a second look at the same thing is no second seed
            first, second = sorted((seeds[seed], place), key=lambda one: _age(report.runs[one]))
            notes.append(
                f"{report.runs[first].name} is left out: {report.runs[second].name} has the same choices and seed."
            )
            place = second
        seeds[seed] = place
    levels = [{level: number for number, level in enumerate(factor.levels)} for factor in factors.varying]
    ordered = sorted(members, key=lambda cell: [order[level] for order, level in zip(levels, cell, strict=True)])
    sorted_seeds = {cell: sorted(members[cell], key=lambda seed: (len(seed), seed)) for cell in members}
    runs = {cell: tuple(members[cell][seed] for seed in seeds) for cell, seeds in sorted_seeds.items()}
    return tuple(Cell(cell, runs[cell], tuple(sorted_seeds[cell])) for cell in ordered), notes


def _age(run: RunReport) -> tuple[bool, str]:
    """Such that of two equal runs the one with scores, then the newer one, comes last."""
    return bool(run.evaluations), run.record.created


def _columns(
    report: Report, cells: Sequence[Cell], kept: Sequence[int]
) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    found: dict[tuple[str, str, Protocol | None], dict[int, Score]] = {}
    standing = _standing([report.runs[place] for place in kept])
    for place in kept:
        for name, evaluation in report.runs[place].last_evaluations.items():
            for score in evaluation.scores:
                protocol = score.protocol and standing[name, score.protocol]
                found.setdefault((name, score.metric, protocol), {})[place] = score
    wanted = {key for key, scores in found.items() for place in scores if _is_wanted(report.runs[place], key)}
    letters = _letters([(name, protocol) for name, metric, protocol in found])
    units = _units(report, kept)
    tables: dict[tuple[str, Protocol | None], Asked | None] = {}
    columns: list[Column] = []
    categories: list[Column] = []
    for key, scores in found.items():
        name, metric, protocol = key
        if key not in wanted and "/" not in metric:
            continue
        if key in wanted and (name, protocol) not in tables:
            tables[name, protocol] = _asked({place: report.runs[place].last_evaluations[name] for place in scores})
        asked = tables.get((name, protocol)) if key in wanted else None
        runs = _runs(scores, cells, units, asked)
        own = tuple(sorted(set(runs.cells.tolist())))
        column = Column(
            name, metric, protocol, letters[name, protocol], own, runs, next(iter(scores.values())).is_share
        )
        (columns if key in wanted else categories).append(column)
    single = len({name for name, _, _ in found}) == 1
    return tuple(columns), tuple(categories) if single else ()


def _standing(runs: Sequence[RunReport]) -> dict[tuple[str, Protocol], Protocol]:
    """(evaluation, protocol) -> the one that stands for all that are alike."""
    made: dict[str, list[Protocol]] = {}
    for run in runs:
        for name, evaluation in run.last_evaluations.items():
            made.setdefault(name, []).append(evaluation.protocol)
    return {(name, one): stands for name, found in made.items() for one, stands in shared(found).items()}


def _is_wanted(run: RunReport, key: tuple[str, str, Protocol | None]) -> bool:
    """Whether a figure is its evaluation's headline, or one that a publication names for this run's parts."""
    name, metric, _ = key
    evaluation = run.last_evaluations.get(name)
    if evaluation is None:
        return False
    primary = evaluation.primary
    if primary is not None and primary.metric == metric:
        return True
    return any(figure.metric == metric for figure in _published(run.record.spec, evaluation.benchmark, metric))


def _published(spec: Mapping[str, object], benchmark: str, metric: str) -> list[Published]:
    llm, tower, recipe, connector = (_name(spec.get(part)) for part in ("llm", "vision_tower", "recipe", "connector"))
    found = published_for(llm, tower, recipe, benchmark, connector)
    return [figure for figure in found if figure.metric in (metric, None)]


def _name(part: object) -> str:
    return str(part.get("name")) if isinstance(part, Mapping) else ""


def _letters(keys: Sequence[tuple[str, Protocol | None]]) -> dict[tuple[str, Protocol | None], str]:
    """A letter for each protocol of evaluations that were made by several."""
    letters = {}
    for name in dict.fromkeys(name for name, _ in keys):
        protocols = list(dict.fromkeys(protocol for other, protocol in keys if other == name))
        for number, protocol in enumerate(protocols):
            letters[name, protocol] = f"[{number + 1}]" if len(protocols) > 1 else ""
    return letters


def _units(report: Report, kept: Sequence[int]) -> dict[int, int]:
    """Run -> the first of those that share a training of its seed with it, by however many steps."""
    units: dict[int, int] = {place: place for place in kept}
    owners: dict[tuple[str, str], int] = {}
    for place in kept:
        run = report.runs[place]
        for stage in run.trainings_finished:
            first = owners.setdefault((stage.digest, str(run.record.spec.get("seed"))), place)
            low, high = sorted((units[first], units[place]))
            units = {one: low if unit == high else unit for one, unit in units.items()}
    return units


@dataclass(frozen=True)
class Asked:
    """What each run got for each question, in points of 100; the questions are the same for all."""

    places: tuple[int, ...]
    scores: Floats
    clusters: Ints


def _asked(evaluations: Mapping[int, Evaluation]) -> Asked | None:
    """Question-level scores of several runs; None where they were not all graded on the same questions."""
    rows = {place: dict(_graded(evaluation)) for place, evaluation in evaluations.items()}
    keys = list(next(iter(rows.values())))
    if not keys or any(row.keys() != rows[next(iter(rows))].keys() for row in rows.values()):
        return None
    scores = np.array([[row[key][0] for key in keys] for row in rows.values()])
    first = next(iter(rows.values()))
    _, clusters = np.unique([first[key][1] for key in keys], return_inverse=True)
    return Asked(tuple(rows), scores, clusters.astype(np.int64))


def _graded(evaluation: Evaluation) -> Iterator[tuple[Key, tuple[float, str]]]:
    """What each question, or group of them that are right only together, got, and about which image it is."""
    units: dict[Key, tuple[float, str]] = {}
    for one in read_generations(evaluation.generations):
        if one.score is not None and one.score >= 0:
            key = ("group", one.group) if one.group else ("item", one.item_id, *by_name(one))
            score = 100 * one.score / evaluation.protocol.top
            units[key] = (min(score, units[key][0]), units[key][1]) if key in units else (score, one.cluster)
    yield from units.items()


def _runs(scores: Mapping[int, Score], cells: Sequence[Cell], units: Mapping[int, int], asked: Asked | None) -> Runs:
    places = list(scores)
    cell_of = {place: number for number, cell in enumerate(cells) for place in cell.runs}
    values = np.array([scores[place].value for place in places])
    errors = np.array([_error(scores[place]) for place in places])
    tops = {100.0 if score.is_share else score.top for score in scores.values()}
    runs = Runs(
        values,
        errors,
        None,
        np.zeros(0, dtype=np.int64),
        np.array([cell_of[place] for place in places]),
        np.array([units[place] for place in places]),
        next(iter(tops)) if len(tops) == 1 else None,
    )
    if asked is None:
        return runs
    table = asked.scores[[asked.places.index(place) for place in places]]
    if np.abs(table.mean(1) - values).max() > ROUNDING:  # the metric is no mean over questions
        return runs
    return replace(runs, values=table.mean(1), scores=table, clusters=asked.clusters)


def _error(score: Score) -> float:
    interval = score.interval()
    return float("nan") if interval is None else (interval[1] - interval[0]) / (2 * Z_95)
