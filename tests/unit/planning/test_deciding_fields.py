"""Of every field of `launch`, `trainer` and `data`: whether it decides a digest, and why. A new field needs a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from pydantic import BaseModel

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.config.launch import LaunchSpec, SlurmSpec
from tinylmm.config.spec import DataBuildSpec, DataSpec, RunSpec, SourceSpec
from tinylmm.config.trainer import DECIDING, SchedulerArguments, TrainerSpec
from tinylmm.config.video import SamplingSpec, VideoSpec
from tinylmm.planning.graph import build_graph

NOTHING: frozenset[str] = frozenset()
TRAINED = frozenset({"train", "eval"})
READ = frozenset({"prepare", "train", "eval"})


@dataclass(frozen=True)
class Row:
    """A field, another value of it, and the kinds of stages that are others with it.

    Attributes:
        why: it decides, or does not.
    """

    value: Any
    changes: frozenset[str]
    why: str


def speed(value: Any, why: str) -> Row:
    return Row(value, NOTHING, why)


WHERE = "where and on how many processes: batches are defined by samples, and a step's sum is the same"
LAYOUT = "how samples lie in memory: attention and loss never cross from one to the next"
SAVES = "when state is written: what is read back is what was written"
WAITS = "how long something is waited for"
ANSWERS = "how many are answered at once: in fp32 an answer is the same in any batch"
LAUNCH = {
    "backend": speed("local", WHERE),
    "nproc": speed(2, WHERE),
    "nodes": speed(2, WHERE),
    "rendezvous": speed("host:29500", WHERE),
    "slurm": speed(SlurmSpec(hours=2.0), "what is asked of a queue: no stage reads it"),
    "slots": speed(2, "which stages run at the same time: none sees another"),
    "deepspeed_stage": speed(3, "how state is shared out over ranks: the same numbers, gathered"),
    "device": speed("cpu", WHERE),
    "micro_batch": speed(3, WHERE),
    "packing": speed(False, LAYOUT),
    "row_tokens": speed(99, LAYOUT),
    "num_workers": speed(3, "who reads samples: their order is the sampler's"),
    "compile": speed(True, "in how many passes over memory a block is computed: the same numbers up to rounding"),
    "attention": speed("eager", "how attention is computed: the kernels agree up to rounding"),
    "gradient_checkpointing": speed(True, "activations are computed again in place of being kept"),
    "cache_features": speed(False, "the same features, computed once or at every step"),
    "cache_features_gib": speed(1.0, "the same features, computed once or at every step"),
    "cache_pixels": speed(True, "the same bytes, decoded once or at every epoch"),
    "cache_pixels_gib": speed(1.0, "the same bytes, decoded once or at every epoch"),
    "save_steps": speed(7, SAVES),
    "save_minutes": speed(1.0, SAVES),
    "keep_checkpoints": speed(3, SAVES),
    "start_timeout_s": speed(9, WAITS),
    "step_timeout_s": speed(9, WAITS),
    "save_timeout_s": speed(9, WAITS),
    "zero3_whole_below": speed(0, "how state is shared out over ranks: the same numbers, gathered"),
    "eval_batch": speed(3, ANSWERS),
    "eval_tokens": speed(99, ANSWERS),
    "gpu": speed("h200", "what a plan reckons with: no stage reads it"),
    "price": speed(2.5, "what a plan reckons with: no stage reads it"),
}
COMPILED = "transformers multiplies in tf32 with it, and fused kernels round otherwise"
TRAINER = {
    "optim": Row("rmsprop", TRAINED, "another optimiser makes other steps"),
    "optim_args": Row("momentum=0.9", TRAINED, "numbers of the optimiser"),
    "lr_scheduler_kwargs": Row(SchedulerArguments(num_cycles=0.4), TRAINED, "another rate at each step"),
    "tf32": Row(True, TRAINED, "products of 19 bits in place of 32"),
    "torch_compile": Row(True, TRAINED, COMPILED),
    "torch_compile_backend": Row("eager", TRAINED, COMPILED),
    "torch_compile_mode": Row("default", TRAINED, COMPILED),
    "torch_empty_cache_steps": speed(3, "gives memory back: no number passes through it"),
    "dataloader_pin_memory": speed(False, "how a batch comes to the GPU"),
    "ddp_bucket_cap_mb": speed(3, "how many gradients are exchanged at once: each is summed over the same ranks"),
    "log_level": speed("info", "messages"),
}
LATER = "only where it is set, so that stores from before it are found"
PLACE = "a place: the content is what decides"
POLICY = "decides whether a run goes on, not what is read of the good records"
OUTSIDE = {  # a source of files that are there; `NoFiles` gives all of them one content
    "annotations": speed("other.json", PLACE),
    "images": speed("elsewhere", PLACE),
    "format": Row("sharegpt", READ, "the same file read otherwise gives other samples"),
    "limit": Row(3, READ, "fewer samples"),
    "on_bad": speed("skip", POLICY),
    "max_bad": speed(3, POLICY),
    "follow_links": Row(True, READ, f"records are read that were refused; {LATER}"),
    "orientation": Row("apply", READ, f"other pixels; {LATER}"),
    "how_to_get": speed("ask", "words for when a file is missing"),
}
NAMED = READ | {"images"}
"""Other images may be named too. (`NoFiles` gives sources of files one content, so that their checks of images are one.)"""
BUILT = OUTSIDE | {  # a source of files that a `data` stage makes: their names choose among them
    "annotations": Row("other.json", NAMED, "which of the files that the data stage makes"),
    "images": Row("elsewhere", NAMED, "which of the folders that the data stage makes"),
    **{field: replace(OUTSIDE[field], changes=NAMED) for field in ("format", "limit", "follow_links")},
}
DATA = {
    "name": speed("other", "a name"),
    "root": speed("/elsewhere", PLACE),
    "build": speed(None, "none here: the files are there"),
    "sources": Row({}, READ, "by each source's own fields, above; that of a stage's own source is shown here"),
}
DATA_BUILT = DATA | {
    "root": speed(None, "none here: a stage makes the files"),
    "build": Row(
        DataBuildSpec(_target_="tinylmm.data.embedded.build_digits", seed=7), NAMED, "other files are made"
    ),  # the benchmark keeps its own
    "sources": replace(DATA["sources"], changes=NAMED),
}


@cache
def composed(built: bool) -> RunSpec:
    """A run whose launch and optimiser take any other value: several ranks, arguments."""
    words = ["launch=torchrun", "launch.nproc=1", "trainer.optim=sgd", "eval=digits"]
    return compose_run(["llm=phi2", "vt=siglip", "data=digits" if built else "data=llava_v1_5", *words])


def with_data(run: RunSpec, **changes: Any) -> RunSpec:
    return run.model_copy(update={"data": run.data.model_copy(update=changes)})


def with_source(run: RunSpec, **changes: Any) -> RunSpec:
    source = run.data.sources["finetune"].model_copy(update=changes)
    return with_data(run, sources={**run.data.sources, "finetune": SourceSpec.model_validate(_given(source))})


def _given(source: SourceSpec) -> dict[str, Any]:
    """What is set, as a YAML would: `on_bad` and `max_bad` hang together, so neither is held against the other here."""
    fields = source.model_dump()
    if fields["on_bad"] == "skip" or fields["max_bad"]:
        fields |= {"on_bad": "skip", "max_bad": fields["max_bad"] or 1}
    return fields


def with_data_field(run: RunSpec, **changes: Any) -> RunSpec:
    if "sources" in changes:
        return with_source(run, limit=5)
    return with_data(run, **changes)


def with_part(part: str) -> Callable[..., RunSpec]:
    def change(run: RunSpec, **changes: Any) -> RunSpec:
        return run.model_copy(update={part: getattr(run, part).model_copy(update=changes)})

    return change


def with_video(run: RunSpec, **changes: Any) -> RunSpec:
    return run.model_copy(update={"video": VideoSpec(**changes)})


SEEN = frozenset({"images", "prepare", "train", "eval"})
VIDEO = {"sampling": Row(SamplingSpec(uniform=4), SEEN, "other frames of the same clips; only where there may be any")}
VIDEO_OF_IMAGES = {"sampling": speed(SamplingSpec(uniform=4), "there are no clips among these files")}


TABLES: dict[str, tuple[type[BaseModel], Mapping[str, Row], Callable[..., RunSpec], bool]] = {
    "launch": (LaunchSpec, LAUNCH, with_part("launch"), True),
    "trainer": (TrainerSpec, TRAINER, with_part("trainer"), True),
    "source of files": (SourceSpec, OUTSIDE, with_source, False),
    "source of built data": (SourceSpec, BUILT, with_source, True),
    "data of files": (DataSpec, DATA, with_data_field, False),
    "built data": (DataSpec, DATA_BUILT, with_data_field, True),
    "videos that built data may have": (VideoSpec, VIDEO, with_video, True),
    "videos of files without any": (VideoSpec, VIDEO_OF_IMAGES, with_video, False),
}
CASES = [(table, field) for table, (_, rows, _, _) in TABLES.items() for field in rows]


def changed(before: RunSpec, after: RunSpec) -> set[str]:
    """Kinds of the stages that are others."""
    old, new = ({stage.digest: stage.kind for stage in build_graph(run, NoFiles())} for run in (before, after))
    return {kind for digest, kind in old.items() if digest not in new}


@pytest.mark.parametrize("table", TABLES)
def test_every_field_has_a_row(table: str) -> None:
    model, rows, _, _ = TABLES[table]
    assert rows.keys() == model.model_fields.keys(), "say of the new field whether it decides a digest, and why"
    assert all(row.why for row in rows.values())


@pytest.mark.parametrize(("table", "field"), CASES, ids=[f"{table}: {field}" for table, field in CASES])
def test_a_field_decides_what_its_row_says(table: str, field: str) -> None:
    _, rows, change, built = TABLES[table]
    run = composed(built)
    after = change(run, **{field: rows[field].value})
    assert after != run or rows[field].value is None, "another value is needed to show it"
    assert changed(run, after) == rows[field].changes, rows[field].why


def test_the_trainers_own_list_says_the_same() -> None:
    assert {field for field, row in TRAINER.items() if row.changes} == DECIDING
