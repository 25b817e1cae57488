"""What a report is made of: plain records with the few numbers derived from them. No torch, no files.

`collect.py` fills them from the store; `tables.py`, `html.py` and `picture.py` only read them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.protocol import Protocol
from tinylmm.evaluation.statistics import SURE, wilson
from tinylmm.store.certificates import Found
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
    blind_p: float | None = None
    """p-value of "as good without the image", by flipping images; None where it was not tested."""
    top: float | None = None
    """End of the metric's scale, which begins at 0; None where it has none, or it is not known."""
    name: str = ""
    """Key of the evaluation under `eval`; by default the benchmark's."""
    protocol: Protocol | None = None

    @property
    def overall(self) -> bool:
        """Whether this is over all questions, not over one category."""
        return "/" not in self.metric

    @property
    def title(self) -> str:
        """What the evaluation is called."""
        return self.name or self.benchmark

    @property
    def label(self) -> str:
        """The metric with its category, without the group's name where that says only that it is accuracy."""
        group, _, category = self.metric.partition("/")
        return category if category and group == "accuracy" else self.metric.replace("/", " ", 1)

    @property
    def mark(self) -> str:
        """In words, what sets the figure apart from the benchmark's own protocol; shorter for a category's."""
        if self.protocol is None:
            return ""
        sample = ["sample"] if self.protocol.limited else []
        if not self.overall:
            return "".join(sample)
        rest = [words for words in self.protocol.departs if not words.startswith("a sample of ")]
        return ", ".join([f"sample of {self.protocol.asked:,}" for _ in sample] + rest)

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

    def beyond(self, other: float) -> bool:
        """Whether `other`, a number that has no error of its own (chance), lies outside the 95 % interval."""
        interval = self.interval()
        return interval is not None and not interval[0] <= other <= interval[1]

    @property
    def beyond_blind(self) -> bool:
        """Whether the model sees something (5 %): by the paired test over images.

        Where a store of an earlier version has none, by both intervals, as wide as this one, and independent: that errs on
        the side of "no".
        """
        interval = self.interval()
        if self.blind is None or interval is None:
            return False
        if self.blind_p is not None:
            return self.blind_p < SURE
        return abs(self.value - self.blind) > sqrt(2) * (interval[1] - interval[0]) / 2


@dataclass(frozen=True)
class Answer:
    """What one model said to one question."""

    stage: str
    text: str
    correct: bool | None
    """None where nobody says what is right: the answers are hidden, or a judge gives ratings."""
    grade: str = ""
    """What the answer was given, where that is neither all nor nothing."""

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
    name: str
    """Its key under `eval`: a benchmark's name, or what the user calls one of several evaluations on it."""
    benchmark: str
    protocol: Protocol
    scores: tuple[Score, ...]
    folder: Path
    """Of the evaluation's stage."""

    @property
    def generations(self) -> Path:
        """The file of all answers."""
        return self.folder / OUTPUT_FOLDER / GENERATIONS_FILE

    @property
    def upload(self) -> Path | None:
        """The file that the benchmark's server takes, where these answers are for it."""
        return next(iter(sorted((self.folder / OUTPUT_FOLDER).glob("upload.*"))), None)

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
        certificate: of a training, what `tinylmm verify` found of it.
        launched: of a training, what its launch chose where it was left open.
        kept: of a training, what its summary says of `pixels` and `features`, where there are such caches.
    """

    folder: Path | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    peak_rss_mib: float | None = None
    error: str | None = None
    certificate: Found | None = None
    launched: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def curve(self, name: str = "loss") -> tuple[list[int], list[float]]:
        """Steps and finite values of one logged quantity; of a step logged twice (resumed) the later counts."""
        points = {int(row["step"]): row[name] for row in self.metrics if "step" in row and row.get(name) is not None}
        kept = {step: float(value) for step, value in points.items() if isfinite(value)}
        return sorted(kept), [kept[step] for step in sorted(kept)]


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one evaluation over a run's training stages."""

    name: str
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
        examples: evaluation -> a balanced choice of its questions, answered by the last evaluated model.
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
    def served_by(self) -> str | None:
        """What to type to serve the model that the run stands for; None as long as its last training is not finished."""
        return self.command_for("serve")

    def command_for(self, command: str, *more: str) -> str | None:
        """What to type to give the run's model to a command that takes a run's name; None as `served_by`."""
        trained = self.record.trainings
        if not trained or not trained[-1].finished or trained[-1].name not in self.models:
            return None
        store = str(self.record.folder.parent.parent.absolute())
        return shlex.join(["tinylmm", command, self.name, *more, "--store", store])

    @property
    def scored_stages(self) -> list[str]:
        """Names of the evaluated models: of training stages in the order in which they ran, then those from elsewhere."""
        scored = [evaluation.stage for evaluation in self.evaluations]
        trained = [stage.name for stage in self.stages if stage.kind == TRAIN and stage.name in scored]
        return list(dict.fromkeys([*trained, *scored]))

    @property
    def headline(self) -> tuple[str, Score] | None:
        """Stage name and score that sum the run up: the first benchmark after the last evaluated stage."""
        for stage in reversed(self.scored_stages):
            for evaluation in self.evaluations:
                if evaluation.stage == stage and evaluation.primary is not None:
                    return stage, evaluation.primary
        return None

    @property
    def trainings_finished(self) -> list[StageReport]:
        """The trainings whose result the run has."""
        return [stage for stage in self.stages if stage.kind == TRAIN and stage.finished]

    @property
    def models(self) -> dict[str, Path]:
        """Name of each finished training stage -> the folder of its model."""
        return {stage.name: model_folder(stage.folder) for stage in self.trainings_finished if stage.folder is not None}

    def score_rows(self) -> list[ScoreRow]:
        """One row a metric, evaluation by evaluation, over all questions first, categories in their file's order."""
        table: dict[tuple[str, str], dict[str, Score]] = {}
        for stage in self.scored_stages:
            for evaluation in (e for e in self.evaluations if e.stage == stage):
                for score in evaluation.scores:
                    table.setdefault((evaluation.name, score.metric), {})[stage] = score
        names = list(dict.fromkeys(name for name, _ in table))
        order = sorted(table, key=lambda key: (names.index(key[0]), "/" in key[1]))
        return [ScoreRow(name, metric, table[name, metric]) for name, metric in order]

    @property
    def last_evaluations(self) -> dict[str, Evaluation]:
        """Each evaluation by its name, after the latest stage that has it."""
        order = self.scored_stages
        return {e.name: e for e in sorted(self.evaluations, key=lambda evaluation: order.index(evaluation.stage))}


@dataclass(frozen=True)
class Report:
    """One run, or several side by side."""

    store: Path
    runs: tuple[RunReport, ...]

    @property
    def name(self) -> str:
        """The runs' names, joined."""
        return "+".join(run.name for run in self.runs)
