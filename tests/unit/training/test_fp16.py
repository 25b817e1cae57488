"""fp16 on the CPU, with torch's own loss scaler put where accelerate puts the GPU's: overflows are skipped, not blamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.project import tiny_project
from tinylmm.stages import train
from tinylmm.training.trainer import LMMTrainer

STEPS = (
    "recipe.stages.pretrain.epochs=10",
    "recipe.stages.pretrain.max_steps=30",
    "recipe.stages.finetune.max_steps=1",
)


def scale_losses(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Let every training use a scaler that doubles its scale after two good steps."""
    build = train.build_trainer

    def build_trainer(*args: Any) -> LMMTrainer:
        trainer = build(*args)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_trainer)


def test_steps_that_overflow_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_losses(monkeypatch, 2.0**20)
    project = tiny_project(tmp_path)
    done = project.train_here(*STEPS)
    assert done.returncode == 0, done.stderr
    manifests = [json.loads((stage / "manifest.json").read_text()) for stage in project.stages("train")]
    summary = next(m["summary"] for m in manifests if m["name"] == "pretrain")
    assert summary["steps"] == 30 and 0 < summary["skipped_steps"] < 30


def test_a_loss_that_is_no_number_still_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_losses(monkeypatch, 2.0**10)
    step = LMMTrainer.compute_loss

    def broken(self: LMMTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs) * float("nan")
        self._losses[-1] = loss.detach()
        return loss

    monkeypatch.setattr(LMMTrainer, "compute_loss", broken)
    done = tiny_project(tmp_path).train_here(*STEPS)
    assert done.returncode == 1 and "step 1 is not finite" in done.stderr
