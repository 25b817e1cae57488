"""A stage whose frozen LLM is in eight-bit floats, for real: alone and over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .project import tiny_project
from .test_launch import weights

WORDS = ("recipe.stages.pretrain.max_steps=2", "recipe.stages.finetune.max_steps=1", "launch.device=cpu")


@pytest.mark.slow
def test_a_stage_in_eight_bits_learns_nearly_what_bf16_learns_on_one_rank_and_on_two(tmp_path: Path) -> None:
    found = []
    precise, eight = "recipe.stages.pretrain.precision=bf16", "recipe.stages.pretrain.fp8=true"
    for name, words in (
        ("one", (eight,)),
        ("two", (eight, "launch=torchrun", "launch.nproc=2")),
        ("plain", ()),
    ):
        project = tiny_project(tmp_path / name)
        done = project.train(precise, *WORDS, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(weights(project))
    one, two, plain = found
    assert one.keys() == plain.keys() == two.keys(), "a saved model has whole weights"

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[n].float() - b[n].float()).square().sum() for n in a)) ** 0.5

    size = float(sum(p.float().square().sum() for p in plain.values())) ** 0.5
    assert 0 < apart(one, plain) < 0.01 * size
    assert apart(two, one) < 0.5 * apart(one, plain), "ranks change the order of sums, and no weight's eight bits"
