"""A stopped training goes on under another launch and another number of ranks, as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.project import Project, tiny_project
from tinylmm.training import trainer

STEPS = 12
"""Of 12 samples in batches of 8, more than one epoch."""
WORDS = (
    f"recipe.stages.pretrain.max_steps={STEPS}",
    "recipe.stages.pretrain.epochs=9",
    "recipe.stages.pretrain.global_batch=8",
    "recipe.stages.pretrain.tune.llm=full",
    "recipe.stages.finetune.max_steps=1",
    "launch.micro_batch=2",
    "tracking.log_steps=1",
    "connector._target_=slow.Connector",
    "trust=[slow,stopping]",
    "eval=none",
)
STOPPING = '''
from tinylmm.launch.backends import torchrun
from tinylmm.stop import STOP_FILE


class Backend(torchrun.Backend):
    """torchrun, asked to save and stop as soon as its ranks have told of a step."""

    def start(self, job):
        self.before = job.metrics.content()
        super().start(job)

    def poll(self):
        rows = self._job.metrics.content()
        if not self.before.startswith(rows) and rows != self.before:
            (self._job.folder / STOP_FILE).touch()
        return super().poll()
'''
SLOW = """
import time

from tinylmm.models.connectors import MLPConnector


class Connector(MLPConnector):
    def forward(self, features):
        time.sleep(0.15)  # so that a stop comes between two steps
        return super().forward(features)
"""
STOP = ("launch.backend=stopping.Backend", "launch.nproc=2")


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


def test_a_training_goes_from_launch_to_launch_and_ends_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path)
    (project.root / "stopping.py").write_text(STOPPING)
    (project.root / "slow.py").write_text(SLOW)
    monkeypatch.syspath_prepend(project.root)
    assert project.train_here(*WORDS, f"store={tmp_path / 'whole'}").returncode == 0
    stop_after(project, 3)
    (work,) = project.store.glob("work/train-*")
    reached = [3]
    for launch in (("launch=zero3", "launch.zero3_whole_below=0"), ("launch=torchrun",), ("launch=zero2",)):
        done = project.train(*WORDS, *launch, *STOP)
        assert done.returncode == 75, done.stdout + done.stderr
        reached.append(max(int(path.name[11:]) for path in (work / "checkpoints").glob("checkpoint-*")))
    assert reached == sorted(set(reached)) and reached[-1] < STEPS, (
        "each launch went on from where the one before stopped"
    )
    for path in (work / f"checkpoints/checkpoint-{reached[-1]}").iterdir():
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
