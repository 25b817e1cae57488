"""Compares every fast path of a run's trainings with a plain reference, and makes a certificate of each training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import TinyLMMError, UserError
from tinylmm.planning.planner import RunPlan
from tinylmm.store.certificates import Certificate, PathResult, code_digest, environment_of
from tinylmm.store.layout import LOG_FILE
from tinylmm.store.provenance import now, software_versions
from tinylmm.store.stage import Stage
from tinylmm.verification.compare import EXACT_SHARE, NOISE_TIMES, Compared, Yardstick, identical
from tinylmm.verification.paths import ALWAYS_ON, PATHS, FastPath, Here, all_off
from tinylmm.verification.reference import Reference, Steps
from tinylmm.verification.trainings import Base, Trainings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """How much is compared.

    Attributes:
        samples: of a step. steps: of a training.
        stages: names of the recipe's stages; empty for all.
        paths: names of rows; empty for all.
    """

    samples: int = 8
    steps: int = 3
    stages: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def verify(plan: RunPlan, asked: Asked, say: Say) -> Iterator[Certificate]:
    """Compare each training of a run; its own store is read, and never written.

    Args:
        say: takes a sentence on what is being done.

    Raises:
        UserError: a stage or a path is asked for that is not there.
    """
    _check(plan, asked)
    with tempfile.TemporaryDirectory(prefix="tinylmm-verify-") as folder, _log_to(Path(folder) / LOG_FILE):
        precision, remark = _precision(plan)
        trainings = Trainings(plan, Path(folder), asked.samples, asked.steps, precision)
        names = [stage.name for stage in trainings.trainings()]
        last = max((names.index(name) for name in asked.stages), default=len(names) - 1)
        for stage in trainings.trainings()[: last + 1]:
            wanted = not asked.stages or stage.name in asked.stages
            if (finished := trainings.reused(stage)) is not None:
                trainings.starts_from(stage, finished)
            elif not wanted:
                say(f"{stage.name}: a model for later stages to start from")
                trainings.starts_from(stage, trainings.run(trainings.base(stage), all_off())[1])
            if wanted:
                yield _Comparison(plan, trainings, stage, asked, say).certificate(remark)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Keep what trainings log off the terminal, with all else that they leave."""
    handler = logging.FileHandler(path, encoding="utf-8")
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _check(plan: RunPlan, asked: Asked) -> None:
    names = list(plan.run.recipe.stages)
    for what, wanted, there in (
        ("--stage", asked.stages, names),
        ("--path", asked.paths, [path.name for path in PATHS] + [AS_CONFIGURED, LAUNCH]),
    ):
        if unknown := [name for name in wanted if name not in there]:
            raise UserError(f"{what} {unknown[0]}: there is none; there are {', '.join(there)}.")


def _precision(plan: RunPlan) -> tuple[str | None, str]:
    """What is computed in where it is not the recipe's own, and why."""
    asked = {stage.precision for stage in plan.run.recipe.stages.values()} - {"fp32"}
    if not asked or plan.run.launch.device == "cpu" or torch.cuda.is_available():
        return None, ""
    return "fp32", f"{' and '.join(sorted(asked))}: no GPU here, so it was compared in fp32"


ALL_OFF, AS_CONFIGURED, LAUNCH = "all off", "as configured", "launch"


class _Comparison:
    """One training in all the ways there are to run it."""

    def __init__(self, plan: RunPlan, trainings: Trainings, stage: Stage, asked: Asked, say: Say) -> None:
        self.launch: LaunchSpec = plan.run.launch
        self.trainings, self.stage, self.asked, self.say = trainings, stage, asked, say
        self.base: Base = trainings.base(stage)
        spec = self.base.job.spec
        on_gpu = self.launch.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.here = Here(
            device="cuda" if on_gpu else "cpu",
            gpus=torch.cuda.device_count() if on_gpu else 0,
            precision=spec.precision,
            samples=spec.global_batch,
            configured=_configured(plan),
            frozen_tower=spec.tune.vision_tower == "frozen",
        )

    def certificate(self, remark: str) -> Certificate:
        """Run everything and hold it against the reference."""
        yardstick = self._yardstick()
        plain = self._run(all_off())
        if isinstance(plain, TinyLMMError):
            raise plain
        results = [self._result(ALL_OFF, plain, yardstick, {})]
        for path in PATHS:
            if not self.asked.paths or path.name in self.asked.paths:
                results.append(self._path(path, yardstick, plain))
        for name, fields, blocked in (self._as_configured(), self._own_launch()):
            if not self.asked.paths or name in self.asked.paths:
                results.append(
                    PathResult(name, {}, "not run here", blocked)
                    if blocked
                    else self._result(name, self._run(fields), yardstick, fields)
                )
        return self._certificate(results, [remark] if remark else [], yardstick)

    # ------------------------------------------------------------------------------------------ one way

    def _path(self, path: FastPath, yardstick: Yardstick, plain: Steps) -> PathResult:
        blocked = path.blocked(self.here)
        if blocked:
            return PathResult(path.name, dict(path.on), "not run here", blocked)
        found = self._run({**all_off(), **path.on}, path.cut)
        if path.shares_rows and isinstance(found, Steps) and found.samples_per_row <= 1:
            why = "no two of these samples share a row (raise --samples)"
            return PathResult(path.name, dict(path.on), "not run here", why)
        result = self._result(path.name, found, yardstick, dict(path.on))
        if path.exact and self._is_exact() and isinstance(found, Steps):
            bits = identical(found, plain)
            if result.status == "equal" and not bits.equal:
                return PathResult(
                    path.name, dict(path.on), "differs", "not the bits it has with this off", bits.as_json()
                )
        return result

    def _run(self, fields: dict[str, Any], cut: int | None = None) -> Steps | TinyLMMError:
        try:
            steps, output = self.trainings.run(self.base, fields, cut)
        except TinyLMMError as error:
            return error
        self.trainings.starts_from(self.stage, output)
        return steps

    def _result(
        self, name: str, found: Steps | TinyLMMError, yardstick: Yardstick, fields: dict[str, Any]
    ) -> PathResult:
        if isinstance(found, UserError):  # a class of models without this path says so as it is loaded
            result = PathResult(name, fields, "not run here", str(found))
        elif isinstance(found, TinyLMMError):
            result = PathResult(name, fields, "failed", str(found))
        else:
            compared: Compared = yardstick.compare(found)
            why = "" if found.gradients else "gradients are spread over the ranks, so weights speak for them"
            result = PathResult(name, fields, "equal" if compared.equal else "differs", why, compared.as_json())
        self.say(f"{self.stage.name}: {name} {result.status}")
        return result

    def _is_exact(self) -> bool:
        return self.here.device == "cpu" and self.here.precision == "fp32"

    # ------------------------------------------------------------------------------------------ the reference

    def _yardstick(self) -> Yardstick:
        spec = self.base.job.spec
        self.say(f"{self.stage.name}: the reference, {spec.max_steps} steps of {spec.global_batch} samples, one by one")
        reference = self._reference(1)
        if self.here.precision == "fp32":
            return Yardstick(reference, self._reference(2, in_reverse=True), "fp32")
        again = self._reference(2, autocast=DTYPES[self.here.precision])
        return Yardstick(reference, again, self.here.precision)

    def _reference(self, number: int, in_reverse: bool = False, autocast: torch.dtype | None = None) -> Steps:
        job = self.base.plainly(self.trainings.folder / "work" / f"{self.stage.key}-reference-{number}")
        return Reference(job, self.device, in_reverse, autocast).run()

    # ------------------------------------------------------------------------------------------ the user's own

    def _as_configured(self) -> tuple[str, dict[str, Any], str]:
        """All that the configuration turns on, together, in this process."""
        fields = {**all_off(), **self.here.configured}
        fields |= {"launch.backend": "local", "launch.nproc": 1, "launch.nodes": 1, "launch.deepspeed_stage": None}
        return AS_CONFIGURED, fields, ""

    def _own_launch(self) -> tuple[str, dict[str, Any], str]:
        """The same as the run is launched: ranks, sharding."""
        launch, fields = self.launch, {**all_off(), **self.here.configured}
        if launch.backend == "local":
            return LAUNCH, fields, "this run is launched in one process, as all rows above"
        if launch.nodes > 1:
            return LAUNCH, fields, f"it takes {launch.nodes} machines"
        if self.here.device == "cuda" and launch.nproc > self.here.gpus:
            return LAUNCH, fields, f"{launch.nproc} ranks need as many GPUs, and there are {self.here.gpus}"
        ranks = launch.nproc if self.here.device == "cuda" else min(launch.nproc, 2)
        return LAUNCH, fields | {"launch.nproc": ranks}, ""

    def _certificate(self, results: Sequence[PathResult], remarks: list[str], yardstick: Yardstick) -> Certificate:
        spec, times = self.base.job.spec, NOISE_TIMES[self.here.precision]
        noise = (
            "its samples in reverse order" if self.here.precision == "fp32" else f"products in {self.here.precision}"
        )
        return Certificate(
            stage=self.stage.name,
            digest=self.base.digest,
            created=now(),
            versions=software_versions(),
            code=code_digest(),
            environment=environment_of(),
            device=torch.cuda.get_device_name() if self.here.device == "cuda" else "cpu",
            precision=self.here.precision,
            samples=spec.global_batch,
            steps=spec.max_steps or 0,
            tolerance=(
                f"{EXACT_SHARE:g} of the largest number of its kind, as fp32 sums differ by that in another order; or "
                f"{times:g} times what the reference differs by from itself with {noise}, where that is more. Of weights, what "
                "the optimiser makes of gradients within their tolerance."
            ),
            noise=yardstick.compare(yardstick.again).as_json(),
            remarks=(
                *remarks,
                *(f"{name}: in every row; the reference has logits at all positions" for name in ALWAYS_ON),
            ),
            paths=tuple(results),
        )


def _configured(plan: RunPlan) -> dict[str, Any]:
    """Fields of the user's launch and trainer that some row has, and what belongs to them."""
    launch = plan.run.launch.model_dump(mode="json")
    trainer = plan.run.trainer.given()
    named = {name for path in PATHS for name in (*path.on, *path.off)}
    groups = {"launch": launch, "trainer": trainer}
    return {name: groups[name.partition(".")[0]].get(name.partition(".")[2]) for name in sorted(named)}
