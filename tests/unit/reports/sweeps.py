"""Builds the store of a small sweep: real run records, stages and answers, with scores as chance and skill would have them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .conftest import SPEC, StoreBuilder, score

BENCHMARK = "digits"


def spec_of(change: Mapping[str, Any]) -> dict[str, Any]:
    """The builder's spec with some values changed: `{"llm.name": "nano", "seed": 1}`."""
    spec = copy.deepcopy(SPEC)
    for key, value in change.items():
        *path, last = key.split(".")
        inner = spec
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return spec


def add_run(
    store: StoreBuilder,
    name: str,
    change: Mapping[str, Any],
    right: float,
    *,
    shared: str | None = None,
    seconds: float = 30.0,
    luck: int = 0,
    benchmarks: Iterable[str] = (BENCHMARK,),
) -> None:
    """A finished run that answers about `right` of all questions rightly.

    Args:
        shared: names its pretraining; by default it has one of its own.
        luck: seed of which questions these are; which are hard is the same for all.
    """
    store.stages = {key: stage for key, stage in store.stages.items() if stage["kind"] == "data"}
    store.stage("train", f"pretrain-{shared or name}", seconds=10.0)
    store.stage("train", f"finetune-{name}", seconds=seconds)
    for benchmark in benchmarks:
        _evaluate(store, f"finetune-{name}", benchmark, right, luck)
    folder = store.run(name)
    record = json.loads((folder / "run.json").read_text())
    for stage in record["stages"]:
        stage["seconds"] = seconds if stage["kind"] == "train" else 1.0
    (folder / "run.json").write_text(json.dumps(record | {"spec": spec_of(change)}))


def _evaluate(store: StoreBuilder, model: str, benchmark: str, right: float, luck: int) -> None:
    folder = store.evaluation(model, 5)
    rows = [json.loads(line) for line in (folder / "output" / "generations.jsonl").read_text().splitlines()]
    hard = np.random.default_rng(1).normal(0, 1, len(rows))
    skill = hard + np.random.default_rng(luck).normal(0, 1, len(rows))
    bar = np.quantile(skill, right)
    for row, one in zip(rows, skill, strict=True):
        row["correct"] = bool(one < bar)
        row["text"] = row["truth"] if row["correct"] else "nine"
    (folder / "output" / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.scores(folder, [score(kind, rows) for kind in (None, *dict.fromkeys(row["category"] for row in rows))])


def sweep(store: StoreBuilder, seeds: int = 3) -> list[str]:
    """Two LLMs by two recipes, `seeds` seeds each; the large LLM is 30 points better, recipes are alike."""
    store.images()
    names = []
    for llm, right in (("small", 0.4), ("large", 0.7)):
        for recipe in ("base", "lora"):
            for seed in range(seeds):
                names.append(f"{llm}-{recipe}-{seed}")
                change = {"llm.name": llm, "recipe.name": recipe, "seed": seed}
                add_run(store, names[-1], change, right + 0.025 * (seed - 1), shared=f"{llm}-{seed}", luck=len(names))
    return names
