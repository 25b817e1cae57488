"""Every launch backend trains the same model: torchrun, ZeRO-2 and ZeRO-3 with two CPU ranks against one process."""

from __future__ import annotations

import json
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


def test_the_only_rank_of_torchrun_trains_on_text_alone_as_one_process_does(
    tmp_path: Path, one_process: Project
) -> None:
    text = ["launch.micro_batch=1", "recipe.stages.finetune.max_steps=6", "recipe.stages.pretrain.max_steps=1"]
    losses = []
    for launch in ("local", "torchrun"):
        project = tiny_project(tmp_path / launch)
        done = project.train(f"launch={launch}", "launch.nproc=1", *text)
        assert done.returncode == 0, done.stderr
        rows = (project.model("finetune").parents[1] / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 6


SMALL_CHUNKS = """
from tinylmm.models import loss
from tinylmm.models.connectors import MLPConnector

loss.CHUNK_TOKENS = 4


class Connector(MLPConnector):
    pass
"""
UNEVEN = (
    "connector._target_=chunks.Connector",
    "trust=[chunks]",
    "launch.micro_batch=1",
    "launch.packing=false",
    "launch.cache_features=false",
    "recipe.stages.pretrain.max_steps=1",
    "recipe.stages.finetune.global_batch=4",
    "recipe.stages.finetune.max_steps=3",
    "recipe.stages.finetune.lr=1e-4",
)
"""Micro-batches of one sample: of text alone on one rank and with an image on the other, of one chunk or of three. The head
that makes the chunks' logits is frozen in the first stage, and trained in the second."""


def test_zero3_with_all_weights_partitioned_runs_modules_equally_often_on_ranks_of_unequal_data(tmp_path: Path) -> None:
    projects = []
    for name, words in (
        ("one", ()),
        ("two", ("launch=zero3", "launch.nproc=2", "launch.zero3_whole_below=0", "launch.step_timeout_s=40")),
    ):
        project = tiny_project(tmp_path / name)
        (project.root / "chunks.py").write_text(SMALL_CHUNKS)
        done = project.train(*UNEVEN, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        projects.append(project)
    expected, found = map(weights, projects)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


BF16 = (
    "recipe.stages.pretrain.max_steps=1",
    "recipe.stages.pretrain.precision=fp32",
    "recipe.stages.finetune.max_steps=1",
    "recipe.stages.finetune.warmup_ratio=0",
    "recipe.stages.finetune.schedule=constant",
    "recipe.stages.finetune.lr=1e-2",
    "recipe.stages.finetune.max_grad_norm=1e6",
    "recipe.stages.finetune.global_batch=16",
    "recipe.stages.finetune.tune.vision_tower.from_layer=1",
    "trainer.optim=sgd",
    "launch.device=cpu",
    "launch.packing=false",
    "launch.micro_batch=1",
)
"""One step of plain gradient descent, so that what is learnt is the gradient: eight micro-batches on each of two ranks."""


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_bf16_learns_the_same_under_zero_as_in_fp32_and_saves_what_it_learnt(launch: str, tmp_path: Path) -> None:
    def learnt(name: str, *words: str) -> dict[str, torch.Tensor]:
        project = tiny_project(tmp_path / name)
        done = project.train(*BF16, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return weights(project)

    start = learnt("start", "recipe.stages.finetune.lr=1e-30", "recipe.stages.finetune.precision=fp32")
    expected = learnt("fp32", "recipe.stages.finetune.precision=fp32")
    found = learnt("bf16", f"launch={launch}", "launch.nproc=2", "recipe.stages.finetune.precision=bf16")
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {torch.float32}
    error = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    size = sum(float((expected[n] - start[n]).square().sum()) for n in expected)
    assert (error / size) ** 0.5 < 0.02, "weights that begin rounded, or are saved rounded, give 0.26"
    for name in (n for n in expected if torch.equal(expected[n], start[n])):
        assert torch.equal(found[name], start[name]), f"{name} is not trained: it is saved as it was"


ADAPTERS = {
    "lora": (
        "recipe=lora",
        "recipe.stages.finetune.tune.llm.lora.r=4",
        "recipe.stages.finetune.tune.llm.lora.dropout=0",
    ),
    "qlora": (
        "recipe=qlora",
        "recipe.stages.finetune.tune.llm.qlora.r=4",
        "recipe.stages.finetune.tune.llm.qlora.dropout=0",
    ),
}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, torch.Tensor]]:
    """A recipe, and what one process makes of it in one step."""
    project = tiny_project(tmp_path_factory.mktemp("adapters"))
    done = project.train_here(*ADAPTERS[request.param], *ONE_STEP_EACH)
    assert done.returncode == 0, done.stderr
    return request.param, weights(project)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "zero2", "zero3"])
def test_two_ranks_train_the_same_adapter_as_one(
    launch: str, tmp_path: Path, adapters: tuple[str, dict[str, torch.Tensor]]
) -> None:
    recipe, expected = adapters
    if (recipe, launch) == ("qlora", "zero3"):
        return  # refused before anything starts: tests/conf/test_from_model.py
    project = tiny_project(tmp_path)
    done = project.train(*ADAPTERS[recipe], f"launch={launch}", "launch.nproc=2", *ONE_STEP_EACH)
    assert done.returncode == 0, done.stderr
    found = weights(project)
    assert found.keys() == expected.keys() and sum("lora_" in name for name in found) == 28
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
