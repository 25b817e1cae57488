"""What a stage held in memory is let go before the next one loads its own."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.integration.project import tiny_project
from tinylmm.stages import train


def test_a_finished_stages_model_and_optimiser_are_gone_when_the_next_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    start, build = train._start_model, train.build_trainer

    def starting(job: Any, *rest: Any, **more: Any) -> Any:
        assert [ref() for ref in held if ref() is not None] == [], f"still in memory when {job.name} loads"
        return start(job, *rest, **more)

    def building(job: Any, loaded: Any, *rest: Any) -> Any:
        trainer = build(job, loaded, *rest)
        held.extend([weakref.ref(loaded.model), weakref.ref(trainer)])
        return trainer

    monkeypatch.setattr(train, "_start_model", starting)
    monkeypatch.setattr(train, "build_trainer", building)
    done = tiny_project(tmp_path).train_here("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert len(held) == 4
