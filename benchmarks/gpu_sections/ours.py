"""The project's own training: the body of a train stage as it is, its model put together on the device with random weights.

Whatever a launch turns on or off, and whatever the stage does with it, is measured as a user gets it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from benchmarks.gpu_sections.kernels import Trace
from benchmarks.gpu_sections.setting import Setting, learnt_a_sample, write_prepared
from benchmarks.middle import middle_tokenizer
from tests.builders import NoFiles
from tinylmm.config.description import ModelDescription
from tinylmm.config.fields import PARTS
from tinylmm.config.spec import RunSpec
from tinylmm.models.build import PartSource, build_lmm
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.planning.choose import settled
from tinylmm.planning.estimate import Training
from tinylmm.planning.graph import build_graph
from tinylmm.planning.lengths import Prepared
from tinylmm.planning.specs import TrainStage
from tinylmm.sizing.flops import Flops
from tinylmm.stages import train
from tinylmm.stages.job import make_job

READY = 8
"""Distinct pictures that wait in memory as pixels."""


class Clock(TrainerCallback):
    """When each optimiser step ended, all of it done on the device; and the kernels of the last one where asked for."""

    def __init__(self, setting: Setting, trace: Trace | None = None) -> None:
        self.setting, self.trace = setting, trace
        self.began = time.perf_counter()
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Begin to trace the last step."""
        if self.trace is not None and state.global_step == state.max_steps - 1:
            self.trace.begin()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.setting.sync()
        self.ends.append(time.perf_counter())
        if self.trace is not None and state.global_step == state.max_steps:
            self.trace.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Note the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def seconds_a_step(self) -> float:
        """Mean of the steps that count."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def until_it_fits(measure: Callable[[int], dict[str, Any]], at_once: int) -> dict[str, Any]:
    """Measure with so much at once, and with half of it where the device has no room, and so on; the row says both."""
    tried: list[int] = []
    while True:
        try:
            return measure(at_once) | {"at_once": at_once, **({"out_of_memory_at": tried} if tried else {})}
        except torch.OutOfMemoryError:
            tried.append(at_once)
            if at_once == 1:
                raise
            at_once //= 2


def train_ours(
    setting: Setting, llm: str, stage: str, words: Sequence[str] = (), files: bool = False, trace: Trace | None = None
) -> dict[str, Any]:
    """Train some steps and say how fast that was.

    Args:
        words: of a run, for its launch.
        files: whether images are read from their JPEGs as always; else they wait in memory as pixels, and this process
            itself makes batches of them.
        trace: takes the kernels of the last step.
    """
    own = words if files else ["launch.num_workers=0", *words]
    knob, default = _knob(setting, llm, stage, own)

    def once(at_once: int) -> dict[str, Any]:
        changed = [] if at_once == default else [f"launch.{knob}={at_once}"]
        return _train(setting, llm, stage, [*own, *changed], files, trace) | {"words": [*words, *changed]}

    return until_it_fits(once, default) | {"at_once_is": knob}


def _knob(setting: Setting, llm: str, stage: str, words: Sequence[str]) -> tuple[str, int]:
    """What says how much a launch takes through the model at once: samples, or positions of rows; and how much that is."""
    run = setting.compose(llm, *words)
    planned = planned_of(setting, run, stage, write_prepared(setting, stage, int(run.llm.architecture["vocab_size"])))
    return ("micro_batch", planned.micro_batch) if planned.positions is None else ("row_tokens", planned.positions)


def _train(
    setting: Setting, llm: str, stage: str, words: Sequence[str], files: bool, trace: Trace | None
) -> dict[str, Any]:
    run = setting.compose(llm, *words)
    found = {one.name: one for one in build_graph(run, NoFiles()) if one.kind == "train"}
    first, spec = TrainStage.model_validate(next(iter(found.values())).spec), found[stage]
    vocabulary = int(run.llm.architecture["vocab_size"])
    data = write_prepared(setting, stage, vocabulary)
    work = setting.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    location = {"root": str(data), "source": {"annotations": "a.json", "images": "images"}}
    planned = planned_of(setting, run, stage, data)
    settings = spec.settings | {"location": location, "locations": None, "max_dropped": 1.0}
    settings |= {"launch": planned.launch.model_dump(mode="json")}
    parents = {"prepared": data, "images": data}
    job = make_job("train", stage, spec.digest, spec.spec, parents, settings, work, setting.folder / "store")
    job.output.mkdir(parents=True)
    setting.forget_peak()
    clock = Clock(setting, trace)
    with _handed_in(setting, run, first, clock, files):
        summary = train.run(job)
    seconds, batch = clock.seconds_a_step(), setting.batch(stage)
    flops = sum(planned.flops().values(), Flops()).total
    rate = batch / seconds
    peak, sheet = setting.measured_flops(), setting.sheet_flops()
    return {
        "llm": llm,
        "stage": stage,
        "samples_per_s": rate,
        "tokens_per_s": rate * planned.lengths.tokens,
        "seconds_a_step": seconds,
        "first_step_s": clock.ends[0] - clock.began,
        "tflop_a_sample": flops / 1e12,
        "share_of_matmul": None if peak is None else rate * flops / peak,
        "mfu": None if sheet is None else rate * flops / sheet,
        "peak_gib": setting.peak_gib(),
        "loss": clock.losses[-1] if clock.losses else float(summary["train_loss"]),
    }


@contextmanager
def _handed_in(setting: Setting, run: RunSpec, first: TrainStage, clock: Clock, files: bool) -> Iterator[None]:
    """Let a train stage begin with random parts on the device, tell the clock of its steps, and write no model."""
    build = train.build_trainer

    def watched(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(clock)
        clock.began = time.perf_counter()
        return trainer

    def frozen(loaded: LoadedModel, tune: Any, *_: Any) -> dict[str, Path]:
        return {part: Path(part) for part in PARTS if getattr(tune, part) == "frozen"}

    with ExitStack() as changed:
        for name, instead in (
            ("_start_model", lambda *_, **__: random_model(setting, run, first)),
            ("kept_parts", frozen),
            ("save_model", lambda *_, **__: None),
            ("build_trainer", watched),
        ):
            changed.enter_context(patch.object(train, name, instead))
        if not files:
            size = run.vision_tower.image.size
            pixels = torch.randn(READY, 3, size, size, generator=torch.Generator().manual_seed(0))
            waiting = lambda self, name: pixels[int(name.partition(".")[0]) % READY]  # noqa: E731
            changed.enter_context(patch.object(train.SeenImages, "pixels", waiting))
        yield


def random_model(setting: Setting, run: RunSpec, first: TrainStage) -> LoadedModel:
    """The run's parts with random weights, made on the device, which takes a second where a CPU takes a minute."""
    assert first.llm and first.vision_tower and first.connector and first.tower_output, (
        "a first stage starts from parts"
    )
    parts = (PartSource(first.llm), PartSource(first.vision_tower), first.connector, first.tower_output)
    with setting.device:
        model = build_lmm(*parts, template=run.llm.template, seed=0, trust=[])
    tower = first.vision_tower
    targets = (first.llm.target, tower.target, tower.encoder)
    made = ModelDescription.of_targets(
        *targets, first.tower_output, first.connector, run.vision_tower.image, run.llm.template, False
    )
    return LoadedModel(model, middle_tokenizer(), made, None)


def planned_of(setting: Setting, run: RunSpec, stage: str, data: Path) -> Training:
    """What `tinylmm plan` knows of a training on these samples, and chooses for it."""
    prepared = Prepared(data, 1.0, learnt_a_sample(data))
    return settled(Training.of(run, stage, [prepared]))
