"""Runs compared question by question: how much better one is, how sure that is, and which answers flipped. No torch.

Answers are paired by what was asked (`reports/pairs.py`), tested by flipping images, and the p-values are corrected for how
many comparisons there are: with a dozen benchmarks, one in twenty would else come out by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tinylmm.errors import UserError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.protocol import Protocol
from tinylmm.evaluation.statistics import SURE, bootstrap_mean, holm, paired_p_value, wilson
from tinylmm.reports.pairs import by_group, pair_answers
from tinylmm.reports.records import Evaluation, Report, RunReport, Score
from tinylmm.reports.stored import Generation, read_stored_spec
from tinylmm.reports.wording import number, points

SHOWN_IN_TERMINAL = 10


@dataclass(frozen=True)
class Flip:
    """A question that one run answered better than the other."""

    item_id: str
    category: str
    question: str
    truth: str
    texts: tuple[str, str]
    scores: tuple[float, float]
    image: ImageRef | None

    @property
    def winner(self) -> int:
        """0 where the first run answered better, 1 where the second did."""
        return int(self.scores[1] > self.scores[0])


@dataclass(frozen=True)
class Pair:
    """One evaluation of two runs.

    Attributes:
        name: of the evaluation.
        runs, stages: whose, and after which training stage.
        protocols: of both; they differ at most in which questions were asked.
        headlines: the benchmark's own number of each run.
        count: questions that both were asked and graded on, or groups of them that are right only together.
        unpaired: questions that only one of them was asked. ungraded: that lack a grade of either.
        same: how many of `count` were answered in the same words.
        means: mean score a question of each run over these, in % of the best score.
        difference: second mean less first, in points, with its 95 % interval (images drawn with replacement).
        p_value: of "both are equally good", two-sided, by flipping images; None where all answers are the same.
        corrected: the same for all `comparisons` made (Holm).
        flips: questions with different scores; those that the first run won before the others.
    """

    name: str
    runs: tuple[str, str]
    stages: tuple[str, str]
    protocols: tuple[Protocol, Protocol]
    headlines: tuple[Score | None, Score | None]
    count: int
    unpaired: int
    ungraded: int
    same: int
    means: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p_value: float | None
    flips: tuple[Flip, ...]
    corrected: float | None = None
    comparisons: int = 1

    @property
    def identical(self) -> bool:
        """Whether both gave the same answers, and so were graded alike."""
        return self.p_value is None

    @property
    def better(self) -> int | None:
        """0 or 1 where that run is better beyond chance, all comparisons counted; else None."""
        return None if self.corrected is None or self.corrected >= SURE else int(self.difference > 0)

    @property
    def wins(self) -> tuple[int, int]:
        """How many questions each run answered better than the other."""
        second = sum(flip.winner for flip in self.flips)
        return len(self.flips) - second, second

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        if self.identical:
            return f"Identical answers to all {self.count:,} questions."
        if not self.flips:
            return (
                f"All {self.count:,} questions were graded alike; {self.count - self.same:,} answers differ in words."
            )
        first, second = self.wins
        sure = "No clear difference; it may well be chance"
        if self.better is not None:
            sure = f"The {('first', 'second')[self.better]} is better"
        return (
            f"{sure}: {points(self.difference)} points ({points(self.interval[0])} to {points(self.interval[1])}, "
            f"p = {p_text(self.p_value)}{self._correction}). Of {self.count:,} questions the second answered {second:,} better "
            f"and {first:,} worse."
        )

    @property
    def _correction(self) -> str:
        if self.comparisons == 1:
            return ""
        return f", {p_text(self.corrected)} corrected for {self.comparisons} comparisons"


def p_text(value: float | None) -> str:
    """A p-value to two digits, or a dash where there is nothing to test."""
    return "–" if value is None else f"{value:.2g}"


def compare_runs(report: Report) -> list[Pair]:
    """Pair the last evaluations of the first run with those of every other, evaluation by evaluation.

    Raises:
        UserError: a single run, or a run that has no evaluation in common with the first by a comparable protocol.
    """
    if len(report.runs) < 2:
        raise UserError(
            f"--compare takes the names of two runs, found {len(report.runs)}; further ones are compared with the first, "
            "too: tinylmm report --compare A B"
        )
    first, *others = report.runs
    pairs = [pair for other in others for pair in _pairs_of(report.store, first, other)]
    return corrected(pairs)


def corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with their p-values corrected for all that were tested."""
    tested = [pair.p_value for pair in pairs if pair.p_value is not None]
    left = iter(holm(tested))
    return [
        pair if pair.p_value is None else replace(pair, corrected=next(left), comparisons=len(tested)) for pair in pairs
    ]


def _pairs_of(store: Path, one: RunReport, other: RunReport) -> list[Pair]:
    first, second = one.last_evaluations, other.last_evaluations
    pairs, reasons = [], []
    for name in (name for name in first if name in second):
        a, b = first[name], second[name]
        if not a.protocol.comparable(b.protocol):
            apart = "; ".join(a.protocol.differences(b.protocol))
            reasons.append(f"{name} was asked and scored by protocols that are not comparable ({apart})")
        elif (pair := _pair(store, (one.name, other.name), a, b)) is None:
            reasons.append(f"of {name} no question was asked of both and scored")
        else:
            pairs.append(pair)
    if not pairs:
        why = (
            "; ".join(reasons)
            or f"the first has {', '.join(first) or 'none'}, the second {', '.join(second) or 'none'}"
        )
        raise UserError(f"{one.name} and {other.name} have no benchmark to compare: {why}.")
    return pairs


def _pair(store: Path, runs: tuple[str, str], a: Evaluation, b: Evaluation) -> Pair | None:
    matched = pair_answers(store, a, b)
    answered = [(x, y) for x, y in matched.both if min(_grade(x), _grade(y)) >= 0]
    if not answered:
        return None
    graded = by_group(answered)
    source, top = read_stored_spec(b.folder), a.protocol.top
    folder = source.images_folder(store)
    pair = compare_answers(graded, top)
    flips = [_flip(x, y, y.first_image(folder, source)) for x, y in graded if x.score != y.score]
    return replace(
        pair,
        name=a.name,
        runs=runs,
        stages=(a.stage, b.stage),
        protocols=(a.protocol, b.protocol),
        headlines=(a.primary, b.primary),
        unpaired=matched.alone,
        ungraded=len(matched.both) - len(answered),
        flips=tuple(sorted(flips, key=lambda flip: flip.winner)),
    )


def compare_answers(graded: Sequence[tuple[Generation, Generation]], top: float = 1.0) -> Pair:
    """What two models' grades of the same questions say of them; names, flips and the correction are the caller's."""
    scores = [(_grade(x) / top, _grade(y) / top) for x, y in graded]
    differences = [y - x for x, y in scores]
    clusters = [x.cluster for x, _ in graded]
    same, count = sum(x.text == y.text for x, y in graded), len(graded)
    unknown = Protocol("", "")
    return Pair(
        name="",
        runs=("", ""),
        stages=("", ""),
        protocols=(unknown, unknown),
        headlines=(None, None),
        count=count,
        unpaired=0,
        ungraded=0,
        same=same,
        means=(100 * sum(x for x, _ in scores) / count, 100 * sum(y for _, y in scores) / count),
        difference=100 * sum(differences) / count,
        interval=_interval(differences, clusters),
        p_value=None if same == count and not any(differences) else paired_p_value(differences, clusters),
        flips=(),
    )


def _grade(one: Generation) -> float:
    """Below 0 where there is no grade: the right answer is hidden, or a judge's rating could not be read (-1)."""
    return -1.0 if one.score is None else one.score


def _interval(differences: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean difference, in points; where resampling shows no spread, from Wilson's over the images."""
    found = bootstrap_mean(differences, clusters)
    if found is not None:
        return 100 * found[0], 100 * found[1]
    mean = sum(differences) / len(differences)
    low, high = wilson(min(abs(mean), 1.0), len(set(clusters)))
    if abs(mean) < 1e-12:  # nothing flipped in so many images
        return -100 * high, 100 * high
    return (100 * low, 100 * high) if mean > 0 else (-100 * high, -100 * low)


def _flip(a: Generation, b: Generation, image: ImageRef | None) -> Flip:
    return Flip(
        item_id=b.item_id,
        category=b.category,
        question=b.question,
        truth=b.truth,
        texts=(a.text, b.text),
        scores=(a.score or 0.0, b.score or 0.0),
        image=image,
    )


def comparison_json(report: Report, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The comparison as plain JSON, every flip included."""
    return {
        "format": 1,
        "runs": [run.name for run in report.runs],
        "test": "signs of whole images flipped; corrected by Holm over all comparisons",
        "benchmarks": [
            {
                "benchmark": pair.name,
                "runs": pair.runs,
                "protocols": [protocol.as_json() for protocol in pair.protocols],
                "stages": pair.stages,
                "count": pair.count,
                "unpaired": pair.unpaired,
                "ungraded": pair.ungraded,
                "identical": pair.identical,
                "means": pair.means,
                "difference": pair.difference,
                "interval": pair.interval,
                "p_value": pair.p_value,
                "p_corrected": pair.corrected,
                "comparisons": pair.comparisons,
                "better": None if pair.better is None else pair.runs[pair.better],
                "flips": [
                    {"id": f.item_id, "category": f.category, "scores": f.scores, "texts": f.texts, "truth": f.truth}
                    for f in pair.flips
                ],
            }
            for pair in pairs
        ],
    }


def render_comparison(report: Report, pairs: Sequence[Pair]) -> Group:
    """The comparison for the terminal: a table, a sentence an evaluation, and the first flips."""
    names = [run.name for run in report.runs]
    several = len(names) > 2
    number_of = max(pair.comparisons for pair in pairs)
    correction = f"; p corrected for {number_of} comparisons (Holm)" if number_of > 1 else ""
    title = f"{', '.join(names[1:])} against {names[0]}: mean score a question in %{correction}"
    table = Table(title=Text(title), title_justify="left")
    rows = [_cells(pair, several) for pair in pairs]
    heads = ["benchmark", "first", "second", "difference", "95 %", "p", "n"]
    for index, head in enumerate(heads):  # a narrow terminal folds the words of headers, never a figure
        width = max(len(cells[index]) for cells in rows)
        table.add_column(Text(head), justify="left" if index == 0 else "right", min_width=width if index else None)
    parts: list[Any] = [table]
    for pair, cells in zip(pairs, rows, strict=True):
        table.add_row(*(Text(cell) for cell in cells))
        parts += [Text(f"{_title(pair, several)}: {line}") for line in (pair.verdict, *pair_notes(pair))]
        parts += [Text(f"  {line}") for line in flip_lines(pair)[:SHOWN_IN_TERMINAL]]
        if len(pair.flips) > SHOWN_IN_TERMINAL:
            parts.append(Text(f"  and {len(pair.flips) - SHOWN_IN_TERMINAL:,} more"))
    return Group(*parts)


def _title(pair: Pair, several: bool) -> str:
    return f"{pair.name}, {pair.runs[1]}" if several else pair.name


def _cells(pair: Pair, several: bool) -> list[str]:
    low, high = pair.interval
    sample = " (sample)" if any(protocol.limited for protocol in pair.protocols) else ""
    means = [number(mean) for mean in pair.means]
    sure = [f"{points(low)} to {points(high)}", p_text(pair.corrected)]
    return [f"{_title(pair, several)}{sample}", *means, points(pair.difference), *sure, f"{pair.count:,}"]


def pair_notes(pair: Pair) -> list[str]:
    """What does not count in a comparison, and where the two were not asked the same."""
    notes = []
    if pair.unpaired:
        notes.append(f"{pair.unpaired:,} questions were asked of one of them only, and do not count.")
    if pair.ungraded:
        notes.append(f"{pair.ungraded:,} questions have no grade of either, and do not count.")
    apart = pair.protocols[0].differences(pair.protocols[1])
    if apart:
        notes.append(
            f"The two were not asked the same questions ({'; '.join(apart)}); their own figures are not comparable."
        )
    return notes


def flip_lines(pair: Pair) -> list[str]:
    """One line a flipped question, wins of both runs in turn."""
    sides = [[flip for flip in pair.flips if flip.winner == side] for side in (1, 0)]
    longest = max(len(side) for side in sides)
    mixed = [side[i] for i in range(longest) for side in sides if i < len(side)]
    return [
        f"{'+' if flip.winner else '−'} {flip.item_id} {' '.join(flip.question.split())[:60]!r} "
        f"expected {flip.truth[:30]!r}: {flip.texts[0][:30]!r} → {flip.texts[1][:30]!r}"
        for flip in mixed
    ]
