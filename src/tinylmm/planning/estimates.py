"""The estimate of a plan as plain JSON, for `tinylmm plan` and for whoever runs out of memory. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tinylmm.config.spec import RunSpec
from tinylmm.planning.advice import advice, amount, fitting_cards, launches, smaller
from tinylmm.planning.choose import choices, fit_of, settled
from tinylmm.planning.estimate import PADDING, Training, disk_bytes
from tinylmm.planning.lengths import Prepared
from tinylmm.planning.planner import RunPlan, stage_status
from tinylmm.planning.shapes import TYPICAL_IMAGE, where_from
from tinylmm.planning.specs import TrainStage
from tinylmm.sizing.layers import UnknownShapeError
from tinylmm.sizing.memory import CONTEXT, FRAGMENTED, GIB
from tinylmm.sizing.parameters import total_parameters, trained_parameters
from tinylmm.store.integrity import read_manifest
from tinylmm.store.layout import OUTPUT_FOLDER
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

log = logging.getLogger(__name__)


def estimate_record(plans: Sequence[RunPlan]) -> dict[str, Any]:
    """What the distinct trainings of one run or a sweep take (`estimate` of `tinylmm plan --json`).

    Bytes, seconds, FLOPs; `hours` are of the wall clock, `gpu_hours` of all ranks. None is what nobody knows.
    """
    rows: dict[str, dict[str, Any]] = {}
    unknown: list[str] = []
    for plan in plans:
        for stage in plan.graph:
            if stage.kind != "train" or stage.digest in rows or stage.name not in plan.run.recipe.stages:
                continue
            try:
                rows[stage.digest] = _row(plan, stage)
            except UnknownShapeError as error:
                unknown.append(f"no estimate of {stage.name}: {error}")
    stages = list(rows.values())
    return {
        "stages": stages,
        "totals": _totals(stages),
        "assumptions": _assumptions(plans[0].run, stages),
        "unknown": list(dict.fromkeys(unknown)),
    }


def training_of(plan: RunPlan, stage: Stage) -> Training:
    """A train stage of a plan with all that its cost depends on, and a choice for each `auto` of its launch.

    Raises:
        UnknownShapeError: what a part looks like is not known.
    """
    return settled(Training.of(plan.run, stage.name, _prepared(plan, stage)))


def settled_settings(plan: RunPlan, stage: Stage) -> dict[str, Any]:
    """How a stage is run: its settings, of a training with what the memory plan chooses for each `auto` of its launch."""
    if stage.kind != "train" or stage.name not in plan.run.recipe.stages:
        return stage.settings
    try:
        training = training_of(plan, stage)
    except UnknownShapeError as error:
        log.info("%s: nothing is chosen by the memory plan: %s", stage.name, error)
        return stage.settings
    log.info("%s: %s", stage.name, choice_words(training))
    return stage.settings | {"launch": training.launch.model_dump(mode="json")}


def choice_words(training: Training) -> str:
    """What was chosen for the launch and the memory that is predicted of it: `rows of 16,384 positions, ...`."""
    fit, card = fit_of(training), training.device.card
    words = [] if training.positions is None else [f"rows of {training.positions:,} positions"]
    words += [f"{fit.label}"] + ["activations computed again"] * training.launch.checkpoints
    room = "" if card is None else f" of {amount(card.memory_bytes)}"
    return f"{', '.join(words)}: {amount(fit.memory.total)}{room} predicted"


def training_seconds(plan: RunPlan, stage: Stage) -> float | None:
    """How long a training will take; None where a part, the number of samples or the device is not known."""
    try:
        training = training_of(plan, stage)
    except UnknownShapeError:
        return None
    return _seconds(training, training.seconds_a_step(fit_of(training).placed))


def _seconds(training: Training, a_step: float | None) -> float | None:
    steps = training.steps
    return None if a_step is None or steps is None else a_step * steps + training.first_pass_seconds()


def _prepared(plan: RunPlan, stage: Stage) -> list[Prepared]:
    """The prepared sources of a training; empty where one is not done."""
    store, weights = Store(plan.run.store), TrainStage.model_validate(stage.spec).mixture or [1.0]
    roles = ["prepared"] if len(weights) == 1 else [f"prepared.{number}" for number in range(len(weights))]
    parents = [plan.graph[stage.parents[role]] for role in roles]
    if not all(map(store.is_complete, parents)):
        return []
    folders = [store.folder(parent) for parent in parents]
    summaries = [read_manifest(folder)["summary"] for folder in folders]
    learnt = [summary["supervised_tokens"] / max(summary["samples"], 1) for summary in summaries]
    checks = [store.folder(plan.graph[parent.parents["images"]]) / OUTPUT_FOLDER for parent in parents]
    outputs = [folder / OUTPUT_FOLDER for folder in folders]
    return [Prepared(*found) for found in zip(outputs, weights, learnt, checks, strict=True)]


def _row(plan: RunPlan, stage: Stage) -> dict[str, Any]:
    training = training_of(plan, stage)
    flops, own, launch = training.flops(), fit_of(training), training.launch
    seconds, steps = training.seconds_a_step(own.placed), training.steps
    whole = _seconds(training, seconds)
    hours = None if whole is None else whole / 3600
    gpu_hours = None if hours is None else hours * launch.ranks
    lengths, card = training.lengths, training.device.card
    return {
        "stage": stage.name,
        "digest": stage.digest,
        "status": stage_status(plan.run.store, stage),
        "device": None if card is None else asdict(card),
        "shapes": {part: where_from(plan.run, part) for part in ("llm", "vision_tower")},
        "parameters": {
            name: {"total": total_parameters(part), "trained": trained_parameters(part, training.tune[name])}
            for name, part in training.parts.items()
        },
        "samples": lengths.samples,
        "steps": steps,
        "tokens_a_sample": lengths.tokens,
        "supervised_a_sample": lengths.supervised,
        "images_a_sample": lengths.images,
        **({"videos_a_sample": lengths.clips, "frames_a_sample": lengths.frames} if lengths.clips else {}),
        "lengths": "read from the prepared data" if lengths.read else "assumed: the data is not prepared yet",
        "flops_a_sample": {name: {"forward": one.forward, "backward": one.backward} for name, one in flops.items()},
        "features_cached": training.cached,
        "launch": own.label,
        "row_tokens": training.positions,
        "chosen": choices(training),
        "launched": choice_words(training),
        "memory": {
            fit.label: asdict(fit.memory) | {"total": fit.memory.total, "fits": fit.fits} for fit in launches(training)
        }
        | {own.label: asdict(own.memory) | {"total": own.memory.total, "fits": own.fits}},
        "fitting_cards": fitting_cards(training) if training.device.on_gpu else [],
        "advice": advice(training),
        "disk": disk_bytes(training),
        "seconds_a_step": seconds,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "money": None if gpu_hours is None or launch.price is None else gpu_hours * launch.price,
    }


def _totals(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over what is still to do; None where one of them is not known."""
    todo = [row for row in stages if row["status"] != "complete"]
    sums: dict[str, Any] = {}
    for key in ("hours", "gpu_hours", "money"):
        values = [row[key] for row in todo]
        sums[key] = None if None in values else sum(values)
    sums["disk"] = sum(row["disk"]["model"] for row in todo)
    sums["disk"] += max((row["disk"]["checkpoints"] for row in todo), default=0.0)
    sums["disk"] += max((row["disk"]["unchanged_parts"] for row in todo), default=0.0)
    sums["disk"] += max((row["disk"]["features"] for row in todo), default=0.0)
    sums["disk"] += max((row["disk"]["pixels"] for row in todo), default=0.0)
    return sums


def _assumptions(run: RunSpec, stages: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    if any(row["lengths"].startswith("assumed") for row in stages):
        found.append(
            "tokens and images of a sample are assumed where the data is not prepared yet (sizing/assumed.yaml); with one "
            "image a sample all are counted as different ones."
        )
    if any(run.image_of(name).mode == "anyres" for name in run.recipe.stages):
        found.append(f"tiled images are taken to be {TYPICAL_IMAGE[0]} x {TYPICAL_IMAGE[1]} pixels.")
    if stages:
        found.append(
            f"memory: rows have {PADDING - 1:.0%} padding, the heaviest micro-batch lies two deviations over the mean; "
            f"on a GPU {FRAGMENTED:.0%} of what comes and goes is lost in pieces, and {CONTEXT / GIB:.0f} GiB is the context's."
        )
    if any(row["seconds_a_step"] is not None for row in stages):
        found.append(
            "time: fitted to trainings measured on one H200, met there within a quarter, and not checked on other devices; "
            "what ranks send each other comes on top, and reading images where no doctor --calibrate has measured it."
        )
    return found


def memory_words(plan: RunPlan, stage: Stage) -> str:
    """What was predicted of a training's memory and what would fit: for one that has run out of it."""
    try:
        training = training_of(plan, stage)
    except UnknownShapeError as error:
        asked = plan.run.launch.micro_batch
        fewer = 8 if asked == "auto" else max(1, asked // 2)
        return f"tinylmm plan has no estimate of it ({error}). Set launch.micro_batch={fewer}."
    own, card = fit_of(training), training.device.card
    terms = ", ".join(f"{name} {amount(size)}" for name, size in asdict(own.memory).items() if size)
    room = "" if card is None else f" of {amount(card.memory_bytes)}"
    said = f"tinylmm plan predicts {amount(own.memory.total)}{room} for {own.label} ({terms})."
    words = advice(training)
    if words:
        return f"{said} {words}"
    changes = [words for words in (smaller(training),) if words]
    changes += [] if training.launch.checkpoints else ["launch.gradient_checkpointing=true"]
    fix = " or ".join(changes) or "launch=zero3 with more ranks"
    return f"{said} It took more: another process may hold memory of the device. Set {fix}, and give the same command again."
