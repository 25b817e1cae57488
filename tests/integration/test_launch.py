"""Every launch backend trains the same model: torchrun, ZeRO-2 and ZeRO-3 with two CPU ranks against one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.project import Project, tiny_project

ONE_STEP = (
    "recipe.stages.pretrain.max_steps=1",
    "recipe.stages.finetune.max_steps=1",
    "recipe.stages.finetune.warmup_ratio=0",
)
ONE_STEP_EACH = (*ONE_STEP, "recipe.stages.pretrain.warmup_ratio=0")


def weights(project: Project) -> dict[str, torch.Tensor]:
    """All tensors of the finetuned model, `part/name` -> tensor."""
    tensors = {}
    for path in project.model("finetune").rglob("*.safetensors"):
        tensors |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return tensors


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = tiny_project(tmp_path_factory.mktemp("local"))
    done = project.train_here(*ONE_STEP_EACH)
    assert done.returncode == 0, done.stderr
    return project


@pytest.mark.parametrize("launch", ["torchrun", "zero2", "zero3"])
def test_two_ranks_make_the_same_step_as_one(launch: str, tmp_path: Path, one_process: Project) -> None:
    project = tiny_project(tmp_path)
    if launch == "zero2":  # takes the pretraining from the store, as any launcher may; the others run it themselves
        shutil.copytree(one_process.store, project.store)
        shutil.rmtree(project.model("finetune").parents[1])
    done = project.train(f"launch={launch}", "launch.nproc=2", *ONE_STEP_EACH)
    assert done.returncode == 0, done.stderr
    (pretrain,) = [line for line in done.stdout.splitlines() if "✓ train    pretrain" in line]
    assert pretrain.endswith("reused") == (launch == "zero2")
    found, expected = weights(project), weights(one_process)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
