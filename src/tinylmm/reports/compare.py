"""Two runs question by question: how much better one is, how sure that is, and which answers flipped. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tinylmm.errors import UserError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.statistics import bootstrap_mean, mcnemar, paired_p_value, wilson
from tinylmm.reports.records import Evaluation, Report, RunReport, Score
from tinylmm.reports.stored import Generation, read_generations, read_stored_spec
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
    """One benchmark of two runs.

    Attributes:
        headlines: the benchmark's own number of each run.
        means: mean score a question of each run, in %, over the questions that both were asked.
        difference: second mean less first, in points, with its 95 % interval (images drawn with replacement).
        p_value: of "both are equally good", two-sided, by `test`.
        unpaired: questions that only one of them was asked.
        flips: questions with different scores; those that the first run won before the others.
    """

    benchmark: str
    protocol: str
    stages: tuple[str, str]
    headlines: tuple[Score | None, Score | None]
    count: int
    unpaired: int
    means: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    flips: tuple[Flip, ...]

    @property
    def wins(self) -> tuple[int, int]:
        """How many questions each run answered better than the other."""
        second = sum(flip.winner for flip in self.flips)
        return len(self.flips) - second, second

    @property
    def verdict(self) -> str:
        """One sentence."""
        first, second = self.wins
        sure = "" if self.p_value < 0.05 else "; that may well be chance"
        return (
            f"{points(self.difference)} points ({points(self.interval[0])} to {points(self.interval[1])}, p = "
            f"{self.p_value:.2g} by {self.test}): of {self.count:,} questions the second answered {second:,} better and "
            f"{first:,} worse{sure}."
        )


def compare_runs(report: Report) -> list[Pair]:
    """Pair the last evaluations of two runs, benchmark by benchmark.

    Raises:
        UserError: not two runs, or they have no benchmark in common that was scored by the same protocol.
    """
    if len(report.runs) != 2:
        raise UserError(
            f"--compare takes the names of two runs, found {len(report.runs)}: tinylmm report --compare A B"
        )
    first, second = (_last_evaluations(run) for run in report.runs)
    pairs, reasons = [], []
    for name in (name for name in first if name in second):
        a, b = first[name], second[name]
        if a.protocol != b.protocol:
            reasons.append(f"{name} was scored by {a.protocol} and by {b.protocol}, which are not comparable")
            continue
        pair = _pair(report.store, a, b)
        if pair is None:
            reasons.append(f"of {name} no question was asked of both and scored")
        else:
            pairs.append(pair)
    if not pairs:
        why = (
            "; ".join(reasons)
            or f"the first has {', '.join(first) or 'none'}, the second {', '.join(second) or 'none'}"
        )
        raise UserError(f"{report.runs[0].name} and {report.runs[1].name} have no benchmark to compare: {why}.")
    return pairs


def _last_evaluations(run: RunReport) -> dict[str, Evaluation]:
    """The evaluation of each benchmark after the latest stage that has one."""
    order = run.scored_stages
    return {e.benchmark: e for e in sorted(run.evaluations, key=lambda evaluation: order.index(evaluation.stage))}


def _pair(store: Path, a: Evaluation, b: Evaluation) -> Pair | None:
    answers = [{one.item_id: one for one in read_generations(e.generations) if one.score is not None} for e in (a, b)]
    both = [(answers[0][key], answers[1][key]) for key in answers[0] if key in answers[1]]
    if not both:
        return None
    scores = [(first.score or 0.0, second.score or 0.0) for first, second in both]
    differences = [y - x for x, y in scores]
    clusters = [first.cluster for first, _ in both]
    source = read_stored_spec(b.folder)
    folder = source.images_folder(store)
    differ = [(first, second) for first, second in both if first.score != second.score]
    flips = [_flip(first, second, second.first_image(folder, source)) for first, second in differ]
    flips.sort(key=lambda flip: flip.winner)
    binary = all(value in (0.0, 1.0) for pair in scores for value in pair)
    wins = [sum(flip.winner == side for flip in flips) for side in (0, 1)]
    return Pair(
        benchmark=a.benchmark,
        protocol=a.protocol,
        stages=(a.stage, b.stage),
        headlines=(a.primary, b.primary),
        count=len(both),
        unpaired=len(answers[0].keys() ^ answers[1].keys()),
        means=(100 * sum(x for x, _ in scores) / len(both), 100 * sum(y for _, y in scores) / len(both)),
        difference=100 * sum(differences) / len(both),
        interval=_interval(differences, clusters),
        p_value=mcnemar(*wins) if binary else paired_p_value(differences, clusters),
        test="McNemar's exact test" if binary else "paired bootstrap",
        flips=tuple(flips),
    )


def _interval(differences: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    if not any(differences):  # resampling shows no spread: nothing flipped in so many images
        high = 100 * wilson(0.0, len(set(clusters)))[1]
        return -high, high
    found = bootstrap_mean(differences, clusters)
    assert found is not None, "there are differences"
    return 100 * found[0], 100 * found[1]


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
        "benchmarks": [
            {
                "benchmark": pair.benchmark,
                "protocol": pair.protocol,
                "stages": pair.stages,
                "count": pair.count,
                "unpaired": pair.unpaired,
                "means": pair.means,
                "difference": pair.difference,
                "interval": pair.interval,
                "p_value": pair.p_value,
                "test": pair.test,
                "flips": [
                    {"id": f.item_id, "category": f.category, "scores": f.scores, "texts": f.texts, "truth": f.truth}
                    for f in pair.flips
                ],
            }
            for pair in pairs
        ],
    }


def render_comparison(report: Report, pairs: Sequence[Pair]) -> Group:
    """The comparison for the terminal: a table, a sentence a benchmark, and the first flips."""
    names = [run.name for run in report.runs]
    table = Table(title=Text(f"{names[1]} against {names[0]}: mean score a question in %"), title_justify="left")
    for index, head in enumerate(("benchmark", "first", "second", "difference", "95 %", "p", "n")):
        table.add_column(Text(head), justify="left" if index == 0 else "right", no_wrap=True)
    parts: list[Any] = [table]
    for pair in pairs:
        low, high = pair.interval
        cells = [pair.benchmark, number(pair.means[0]), number(pair.means[1]), points(pair.difference)]
        cells += [f"{points(low)} to {points(high)}", f"{pair.p_value:.2g}", f"{pair.count:,}"]
        table.add_row(*(Text(cell) for cell in cells))
        parts.append(Text(f"{pair.benchmark}: {pair.verdict}"))
        parts += [Text(f"  {line}") for line in flip_lines(pair)[:SHOWN_IN_TERMINAL]]
        if len(pair.flips) > SHOWN_IN_TERMINAL:
            parts.append(Text(f"  and {len(pair.flips) - SHOWN_IN_TERMINAL:,} more"))
    return Group(*parts)


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
