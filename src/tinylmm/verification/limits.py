"""A run of a few samples and steps, made of the user's own. No torch."""

from __future__ import annotations

from typing import Any

from tinylmm.config.recipe import RecipeStage, TuneHow, TuneSpec
from tinylmm.config.spec import DataBuildSpec, DataSpec, RunSpec

EMBEDDED = "tinylmm.data.embedded.build_digits"
READ_TIMES = 4
"""Records read of each source, over the samples that the steps take: some are too long, and an epoch is not to end."""
BUILD_STEPS = 2
"""Of parts that a run builds and the user's store has not: any weights will do."""


def limited(run: RunSpec, samples: int, steps: int, precision: str | None) -> RunSpec:
    """The run with steps of so many samples, so many of them a stage, of the first records of its data.

    Args:
        precision: of its trainings, where it is not to be their own.
    """
    records = READ_TIMES * samples * steps
    stages = {name: _stage(stage, samples, steps, precision) for name, stage in run.recipe.stages.items()}
    changes: dict[str, Any] = {
        "recipe": run.recipe.model_copy(update={"stages": stages}),
        "data": _data(run.data, records),
        "eval": {},
        # every way of training says its own; one that cannot compute here shall not end the others
        "launch": run.launch.model_copy(update={"attention": "auto"}),
    }
    for role in ("llm", "vision_tower"):
        part = getattr(run, role)
        if part.build is not None:
            steps_of = {"steps": min(part.build.steps, BUILD_STEPS), "data": _data(part.build.data, records)}
            changes[role] = part.model_copy(update={"build": part.build.model_copy(update=steps_of)})
    return run.model_copy(update=changes)


def _stage(stage: RecipeStage, samples: int, steps: int, precision: str | None) -> RecipeStage:
    update: dict[str, Any] = {
        "global_batch": min(stage.global_batch, samples),
        "max_steps": steps,
        "max_dropped": 1.0,
        "tune": TuneSpec(**{part: _without_dropout(how) for part, how in stage.tune}),
    }
    return stage.model_copy(update=update | ({} if precision is None else {"precision": precision}))


def _without_dropout(how: str | TuneHow) -> str | TuneHow:
    """What is drawn at random cannot be compared."""
    if isinstance(how, str):
        return how
    found = {
        name: adapter.model_copy(update={"dropout": 0.0})
        for name, adapter in how
        if name in ("lora", "qlora") and adapter
    }
    return how.model_copy(update=found)


def _data(data: DataSpec, records: int) -> DataSpec:
    sources = {
        name: source.model_copy(update={"limit": records if source.limit is None else min(source.limit, records)})
        for name, source in data.sources.items()
    }
    return data.model_copy(update={"sources": sources, "build": _build(data.build, records)})


def _build(build: DataBuildSpec | None, records: int) -> DataBuildSpec | None:
    """Our own builder is told to make less; another one makes what it makes."""
    if build is None or build.target != EMBEDDED:
        return build
    options = {name: min(int(count), records) for name, count in build.options.items()}
    return build.model_copy(update={"options": options})
