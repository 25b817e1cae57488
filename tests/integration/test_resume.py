"""A stopped training goes on under another launch and another number of ranks, as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.project import Project, tiny_project
from tinylmm.training import trainer

STEPS = 8
"""Of 12 samples in batches of 8, more than one epoch."""
WORDS = (
    f"recipe.stages.pretrain.max_steps={STEPS}",
    "recipe.stages.pretrain.epochs=4",
    "recipe.stages.pretrain.global_batch=8",
    "recipe.stages.pretrain.tune.llm=full",
    "recipe.stages.finetune.max_steps=1",
    "launch.micro_batch=2",
    "tracking.log_steps=1",
    "eval=none",
)
STOPPING = '''
from tinylmm.launch.backends import torchrun
from tinylmm.stop import STOP_FILE


class Backend(torchrun.Backend):
    """torchrun, asked to save and stop as soon as its ranks have done a step."""

    def start(self, job):
        super().start(job)
        (job.folder / STOP_FILE).touch()
'''
STOP = ("launch.backend=stopping.Backend", "trust=[stopping]", "launch.nproc=2")


def pretraining(store: Path) -> Path:
    """Folder of the first training, finished."""
    for stage in (store / "stages").glob("train-*"):
        if json.loads((stage / "manifest.json").read_text())["name"] == "pretrain":
            return stage
    raise AssertionError("no pretraining is finished")


def weights(store: Path) -> dict[str, torch.Tensor]:
    files = (pretraining(store) / "output/model").rglob("*.safetensors")
    return {f"{f.parent.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def stop_after(project: Project, step: int) -> None:
    """Train in this process, and stop when so many more steps are done."""
    asked = iter([False] * (step - 1) + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "stop_requested", lambda: next(asked, True))
        done = project.train_here(*WORDS)
    assert done.returncode == 75, done.stderr


def test_a_training_goes_from_launch_to_launch_and_ends_as_in_one_process(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    (project.root / "stopping.py").write_text(STOPPING)
    assert project.train_here(*WORDS, f"store={tmp_path / 'whole'}").returncode == 0
    stop_after(project, 3)
    for launch in (("launch=zero3", "launch.zero3_whole_below=0"), ("launch=torchrun",), ("launch=zero2",)):
        done = project.train(*WORDS, *launch, *STOP)
        assert done.returncode == 75, done.stdout + done.stderr
    (work,) = project.store.glob("work/train-*")
    assert sorted(path.name for path in (work / "checkpoints").glob("c*")) == ["checkpoint-5", "checkpoint-6"]
    for path in (work / "checkpoints/checkpoint-6").iterdir():
        assert path.stat().st_size < 3e6, f"{path.name}: frozen weights have no place in a checkpoint"
    done = project.train_here(*WORDS)
    assert done.returncode == 0, done.stdout + done.stderr

    stage = pretraining(project.store)
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)], "each step is written once, by one rank"
    expected = [
        json.loads(line) for line in (pretraining(tmp_path / "whole") / "metrics.jsonl").read_text().splitlines()
    ]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["lr"] == other["lr"]
    log = (stage / "log.txt").read_text()
    assert "was written under launch=local and is continued under launch=zero3 launch.nproc=2" in log
    assert "refused" not in log
    found, whole = weights(project.store), weights(tmp_path / "whole")
    assert whole.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
