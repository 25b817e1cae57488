"""Weights & Biases for real, offline: a stage with it on is finished, and each stage is a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.project import tiny_project

SHORT = ("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1", "tracking.wandb.enabled=true")


@pytest.mark.parametrize("mode", [None, "offline", "disabled"])
def test_stages_are_published_and_each_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    """Without a key it works offline by itself."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in (
        "WANDB_MODE",
        "WANDB_DIR",
        "WANDB_PROJECT",
        "WANDB_NAME",
        "WANDB_LOG_MODEL",
        "WANDB_WATCH",
        "WANDB_SILENT",
    ):
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    project = tiny_project(tmp_path)
    done = project.train_here(*SHORT)
    assert done.returncode == 0, done.stderr
    assert len(project.stages("train")) == 2
    assert not [path for stage in project.stages("train") for path in stage.rglob("*wandb*")]
    runs = list((project.store / "tracking/wandb").glob("offline-run-*")) if mode != "disabled" else []
    assert len(runs) == (0 if mode == "disabled" else 2)
