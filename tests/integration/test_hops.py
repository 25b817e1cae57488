"""A reader who follows one step from the command to the loss meets few functions, in few files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import tinylmm
from tests.integration.project import tiny_project
from tinylmm.training.trainer import LMMTrainer

SOURCE = Path(tinylmm.__file__).parent


def our_calls(frame: FrameType | None) -> list[tuple[str, str]]:
    """(file below src/tinylmm, function) of our frames on the stack, outermost first; a lambda is no hop."""
    calls = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SOURCE) and not frame.f_code.co_name.startswith("<"):
            calls.append((path.relative_to(SOURCE).as_posix(), frame.f_code.co_name))
        frame = frame.f_back
    return [call for call in reversed(calls) if call != ("cli/errors.py", "guarded")]


def test_six_functions_over_five_files_lie_on_the_way_to_the_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[str, str]]] = []
    step = LMMTrainer.compute_loss

    def compute_loss(self: LMMTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append([*our_calls(sys._getframe().f_back), ("training/trainer.py", "compute_loss")])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMMTrainer, "compute_loss", compute_loss)
    project = tiny_project(tmp_path)
    assert (
        project.train_here(*(f"recipe.stages.{name}.max_steps=1" for name in ("pretrain", "finetune"))).returncode == 0
    )
    assert seen[0] == [
        ("cli/train.py", "run"),
        ("launch/runner.py", "execute"),
        ("launch/runner.py", "start"),
        ("launch/backends/local.py", "start"),
        ("stages/train.py", "run"),
        ("training/trainer.py", "compute_loss"),
    ]
