"""What a report is made of: plain records with the few numbers derived from them. No torch, no files.

`collect.py` fills them from the store; `tables.py`, `html.py` and `picture.py` only read them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.statistics import Z_95, wilson
from tinylmm.store.layout import GENERATIONS_FILE, OUTPUT_FOLDER, model_folder
from tinylmm.store.runs import TRAIN, RunRecord, StageRow


@dataclass(frozen=True)
class Score:
    """One number of a benchmark's scores.json; `value`, `blind` and `chance` in the metric's own unit (accuracy: %)."""

    benchmark: str
    metric: str
    value: float
    blind: float | None
    """The same model asked without the image."""
    chance: float | None
    """A uniform guess among each question's options."""
    count: int
    bounds: tuple[float, float] | None = None
    """95 % interval as the evaluation found it, by resampling images."""

    @property
    def overall(self) -> bool:
        """Whether this is over all questions, not over one category."""
        return "/" not in self.metric

    @property
    def label(self) -> str:
        """The category's name, or the metric's where it is over all questions."""
        return self.metric.partition("/")[2] or self.metric

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of right answers in %, so that binomial intervals hold."""
        return self.metric.partition("/")[0] == "accuracy" and self.count > 0

    def interval(self) -> tuple[float, float] | None:
        """95 % interval in the metric's unit: the evaluation's own, else Wilson's for a share of right answers, else None."""
        if self.bounds is not None or not self.is_share:
            return self.bounds
        low, high = wilson(self.value / 100, self.count)
        return 100 * low, 100 * high

    def differs_from(self, other: float) -> bool:
        """Whether `other`, a share in % over as many questions, lies further away than sampling explains (95 %).

        The two are treated as independent; as they share their questions, this errs on the side of "no difference".
        """
        variance = (self.value * (100 - self.value) + other * (100 - other)) / max(self.count, 1)
        return self.is_share and abs(self.value - other) > Z_95 * sqrt(variance)


@dataclass(frozen=True)
class Answer:
    """What one model said to one question."""

    stage: str
    text: str
    correct: bool

    def literal(self, truth: str) -> bool:
        """Whether the text is the truth word for word, so that showing both says nothing more."""
        return self.text.strip().lower() == truth.strip().lower()


@dataclass(frozen=True)
class Example:
    """A held-out question with everything that was answered to it."""

    question_id: str
    category: str
    question: str
    truth: str
    image_name: str
    image: ImageRef | None
    """None where the question has no image or its path leads out of the images folder."""
    answer: Answer
    earlier: tuple[Answer, ...] = ()
    """Answers of the models after earlier training stages, then without the image (stage "blind")."""


@dataclass(frozen=True)
class Evaluation:
    """One benchmark run on the model that one training stage left."""

    stage: str
    """Name of the training stage."""
    benchmark: str
    protocol: str
    scores: tuple[Score, ...]
    folder: Path
    """Of the evaluation's stage."""

    @property
    def generations(self) -> Path:
        """The file of all answers."""
        return self.folder / OUTPUT_FOLDER / GENERATIONS_FILE

    @property
    def primary(self) -> Score | None:
        """The first score over all questions, the number one quotes."""
        return next((score for score in self.scores if score.overall), None)


@dataclass(frozen=True)
class StageReport(StageRow):
    """One stage as a run saw it, with what its folder holds.

    Attributes:
        seconds: of this run; where the stage was reused, of the run that made it.
        folder: in the store when finished, the work folder otherwise; None where neither exists.
        metrics: rows of metrics.jsonl.
        peak_rss_mib: largest resident memory of the run that made it.
        error: last traceback of a failed stage.
    """

    folder: Path | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    peak_rss_mib: float | None = None
    error: str | None = None

    def curve(self, name: str = "loss") -> tuple[list[int], list[float]]:
        """Steps and finite values of one logged quantity; of a step logged twice (resumed) the later counts."""
        points = {int(row["step"]): row[name] for row in self.metrics if "step" in row and row.get(name) is not None}
        kept = {step: float(value) for step, value in points.items() if isfinite(value)}
        return sorted(kept), [kept[step] for step in sorted(kept)]


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one benchmark over a run's training stages."""

    benchmark: str
    metric: str
    by_stage: dict[str, Score]

    @property
    def last(self) -> Score:
        """The score after the latest training stage that was evaluated."""
        return list(self.by_stage.values())[-1]


@dataclass(frozen=True)
class RunReport:
    """One run with everything the store knows of it.

    Attributes:
        record: what run.json says.
        stages: its stages, with what their folders hold.
        examples: benchmark -> a balanced choice of its questions, answered by the last evaluated model.
        notes: what is missing from the store, and what stages left out, in words.
    """

    record: RunRecord
    stages: tuple[StageReport, ...]
    evaluations: tuple[Evaluation, ...]
    examples: dict[str, tuple[Example, ...]]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.name

    @property
    def command(self) -> str:
        """What to type to get this run again."""
        return shlex.join(["tinylmm-train", *self.record.overrides])

    @property
    def scored_stages(self) -> list[str]:
        """Names of the training stages whose model was evaluated, in the order in which they ran."""
        scored = {evaluation.stage for evaluation in self.evaluations}
        return [stage.name for stage in self.stages if stage.kind == TRAIN and stage.name in scored]

    @property
    def headline(self) -> tuple[str, Score] | None:
        """Stage name and score that sum the run up: the first benchmark after the last evaluated stage."""
        for stage in reversed(self.scored_stages):
            for evaluation in self.evaluations:
                if evaluation.stage == stage and evaluation.primary is not None:
                    return stage, evaluation.primary
        return None

    @property
    def models(self) -> dict[str, Path]:
        """Name of each finished training stage -> the folder of its model."""
        trained = [stage for stage in self.stages if stage.kind == TRAIN and stage.finished]
        return {stage.name: model_folder(stage.folder) for stage in trained if stage.folder is not None}

    def score_rows(self) -> list[ScoreRow]:
        """One row a metric, benchmark by benchmark, over all questions first, categories in their file's order."""
        table: dict[tuple[str, str], dict[str, Score]] = {}
        for stage in self.scored_stages:
            for evaluation in (e for e in self.evaluations if e.stage == stage):
                for score in evaluation.scores:
                    table.setdefault((score.benchmark, score.metric), {})[stage] = score
        benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in table))
        order = sorted(table, key=lambda key: (benchmarks.index(key[0]), "/" in key[1]))
        return [ScoreRow(benchmark, metric, table[benchmark, metric]) for benchmark, metric in order]


@dataclass(frozen=True)
class Report:
    """One run, or several side by side."""

    store: Path
    runs: tuple[RunReport, ...]

    @property
    def name(self) -> str:
        """The runs' names, joined."""
        return "+".join(run.name for run in self.runs)
