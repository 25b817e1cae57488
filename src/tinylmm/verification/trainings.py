"""The trainings that are compared: real stages of the user's run, in a temporary store, on a few of its samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StoppedError
from tinylmm.launch.backends import make_backend
from tinylmm.planning.graph import StageGraph
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.planner import RunPlan, plan_run, require_files
from tinylmm.planning.specs import TrainStage
from tinylmm.stages.job import Observed, StageJob, make_job
from tinylmm.store.integrity import check_folder
from tinylmm.store.layout import MARKER_FILE, METRICS_FILE, OUTPUT_FOLDER, StoreLayout
from tinylmm.store.rows import read_rows
from tinylmm.store.stage import Stage
from tinylmm.training.observe import GRADIENTS_FILE, OBSERVED, WEIGHTS_FILE, read_tensors
from tinylmm.verification.limits import limited
from tinylmm.verification.paths import Fields
from tinylmm.verification.reference import Steps

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
REUSED = ("data", "parts", "train")
"""Kinds of which the user's finished stages are read, where there are any: data, built parts, and models to start from."""


@dataclass(frozen=True)
class Base:
    """One training of the run, cut down.

    Attributes:
        name: of the recipe's stage.
        digest: of the user's own stage.
        job: without a folder of its own; `Trainings.run` gives it one.
    """

    name: str
    digest: str
    job: StageJob[TrainStage]

    def with_fields(self, fields: Fields, folder: Path, observed: Observed) -> StageJob[TrainStage]:
        """The training as launched with these fields."""
        spec = self.job.spec
        whole = {"micro_batch": spec.global_batch, "row_tokens": spec.max_length}
        launch = self.job.settings.launch.model_dump(mode="json") | _under("launch", fields, whole)
        given = _under("trainer", fields, {})
        settings = self.job.settings.model_dump(mode="json", exclude_unset=True)
        trainer = _merged(self.job.settings.trainer.given(), given)
        tracking = {"tensorboard": False, "wandb": {"enabled": False}, "log_steps": 1}
        settings |= {"launch": launch, "trainer": trainer, "tracking": tracking}
        deciding = {name: value for name, value in given.items() if name.startswith("torch_compile")}
        record = spec.as_json()
        record["trainer"] = _merged(record.get("trainer", {}), deciding)
        job = self.job
        return make_job(
            job.kind, job.name, job.digest, record, job.parents, settings, folder, job.store, observed=observed
        )

    def plainly(self, folder: Path) -> StageJob[TrainStage]:
        """The training as the reference takes it: in fp32, with eager attention, its weights in a folder of their own."""
        (folder / OUTPUT_FOLDER).mkdir(parents=True)
        job = self.with_fields({"launch.attention": "eager"}, folder, Observed())
        return replace(job, spec=job.spec.model_copy(update={"precision": "fp32"}))


class Trainings:
    """Makes what trainings need, and runs them in any launch.

    Args:
        plan: of the user's own run.
        folder: an empty one, for all that is made.
        samples, steps: of each training.
        precision: that trainings compute in, where it is not their own.
    """

    def __init__(self, plan: RunPlan, folder: Path, samples: int, steps: int, precision: str | None) -> None:
        self.own = StoreLayout(plan.run.store)
        self.folder = folder
        self._finished = {(stage.kind, stage.name): stage for stage in plan.graph if stage.kind in REUSED}
        run = limited(plan.run, samples, steps, precision).model_copy(update={"store": folder})
        small = plan_run(run, plan.name)
        require_files(small)
        self.graph: StageGraph = small.graph
        self._outputs: dict[str, Path] = {}
        self._count = 0

    def trainings(self) -> list[Stage]:
        """The run's trainings, in order."""
        return [stage for stage in self.graph if stage.kind == "train"]

    def base(self, stage: Stage) -> Base:
        """One of them with all that it needs, which is made now."""
        parents = {role: self._output(self.graph[digest]) for role, digest in stage.parents.items()}
        own = self._finished[stage.kind, stage.name]
        job = make_job(
            stage.kind, stage.name, own.digest, stage.spec, parents, stage.settings, self._work(stage), self.folder
        )
        return Base(stage.name, own.digest, job)

    def starts_from(self, stage: Stage, output: Path) -> None:
        """Let later trainings go on from this training's output, where the user's store has no finished one."""
        self._outputs.setdefault(stage.digest, output)

    def reused(self, stage: Stage) -> Path | None:
        """Output of the user's own finished stage; None where there is none."""
        own = self._finished.get((stage.kind, stage.name))
        if own is None:
            return None
        folder = self.own.stage(own.key)
        if not (folder / MARKER_FILE).exists():
            return None
        if problems := check_folder(folder, deep=True):  # it is the next run that sets it aside, not this one
            log.warning("%s is damaged and not used: %s", folder, "; ".join(problems))
            return None
        return (folder / OUTPUT_FOLDER).resolve()

    def run(self, base: Base, fields: Fields, cut: int | None = None) -> tuple[Steps, Path]:
        """Run a training, or begin it, break it off and let it go on; returns its steps and its output.

        Raises:
            TinyLMMError: it failed; the message says why.
        """
        self._count += 1
        folder = self.folder / "work" / f"{base.name}-{self._count}".replace("/", "-")
        (folder / OUTPUT_FOLDER).mkdir(parents=True)
        job = base.with_fields(fields, folder, Observed(cut))
        if cut is not None:
            try:
                self._do(job)
            except StoppedError as stopped:
                log.info("%s: %s", base.name, stopped)
            job = replace(job, observed=Observed())
        self._do(job)
        return _steps(folder), job.output

    def _output(self, stage: Stage) -> Path:
        """What a stage has made: the user's own finished one where its kind is reused, else one that is made here."""
        if stage.digest not in self._outputs:
            self._outputs[stage.digest] = self.reused(stage) or self._make(stage)
        return self._outputs[stage.digest]

    def _make(self, stage: Stage) -> Path:
        assert stage.kind != "train", "trainings are made in the recipe's order, by who compares them"
        parents = {role: self._output(self.graph[digest]) for role, digest in stage.parents.items()}
        job = make_job(
            stage.kind, stage.name, stage.digest, stage.spec, parents, stage.settings, self._work(stage), self.folder
        )
        self._do(job)
        return job.output

    def _work(self, stage: Stage) -> Path:
        folder = self.folder / "work" / stage.key
        (folder / OUTPUT_FOLDER).mkdir(parents=True, exist_ok=True)
        return folder

    def _do(self, job: StageJob[Any]) -> None:
        job.write()
        launch: LaunchSpec = job.settings.launch
        backend = make_backend(launch, KINDS[job.kind].uses_ranks, job.settings.trust)
        try:
            backend.start(job)
            while backend.poll() is None:
                time.sleep(POLL_SECONDS)
        finally:
            backend.stop(now=True)


def _under(group: str, fields: Fields, whole: Mapping[str, int]) -> dict[str, Any]:
    """The fields of one group; a number that is given as a share (a float) becomes one of `whole`."""
    found = {name.partition(".")[2]: value for name, value in fields.items() if name.partition(".")[0] == group}
    shares = {name: value for name, value in found.items() if name in whole and isinstance(value, float)}
    return found | {name: max(1, round(share * whole[name])) for name, share in shares.items()}


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, without what is taken back."""
    return {name: value for name, value in {**one, **other}.items() if value is not None}


def _steps(folder: Path) -> Steps:
    """What a training left."""
    found = [row for _, row in read_rows(folder / METRICS_FILE) if row is not None and "loss" in row]
    losses = {row["step"]: row["loss"] for row in found}
    shared = max((row.get("samples_per_row", 1.0) for row in found), default=1.0)
    gradients, weights = (read_tensors(folder / OBSERVED / name) for name in (GRADIENTS_FILE, WEIGHTS_FILE))
    return Steps([losses[step] for step in sorted(losses)], gradients, weights, samples_per_row=shared)
