"""Muon and AdamW with moments in bf16, for real: over ranks as alone, and on from a checkpoint as without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .project import tiny_project
from .test_launch import weights

WORDS = (
    "recipe.stages.pretrain.max_steps=2",
    "recipe.stages.finetune.max_steps=4",
    "recipe.stages.finetune.precision=fp32",
    "recipe.stages.pretrain.precision=fp32",
    "launch.device=cpu",
)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["muon", "adamw_bf16"])
def test_two_ranks_learn_what_one_process_learns(optim: str, tmp_path: Path) -> None:
    found = []
    for name, words in (
        ("one", ()),
        ("two", ("launch=torchrun", "launch.nproc=2")),
        ("plain", ("trainer.optim=null",)),
    ):
        project = tiny_project(tmp_path / name)
        done = project.train(f"trainer.optim={optim}", *WORDS, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(weights(project))
    one, two, plain = found

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[n].float() - b[n].float()).square().sum() for n in a)) ** 0.5

    assert apart(two, one) < 0.1 * apart(plain, one), "rounding is all that ranks change"
