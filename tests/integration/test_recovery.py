"""What happens when a run is killed, stopped, damaged or fed a NaN: nothing is lost, nothing wrong is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.integration.project import Project, environment, tiny_project

NAN_CONNECTOR = '''
import os
import torch
from tinylmm.models.connectors import MLPConnector


class PlantedNaN(MLPConnector):
    """Gives NaN in the third training forward, or in the backward pass of it, on the last rank only."""

    calls = 0

    def forward(self, features):
        PlantedNaN.calls += self.training
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        output = super().forward(features)
        if not last or PlantedNaN.calls != 3:
            return output
        if "WHERE" == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("nan"))
        return output
'''


def wait_for(condition: object, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_sigterm_saves_exits_75_and_the_same_command_continues(project: Project) -> None:
    words = (
        "launch.save_steps=1000",
        "recipe.stages.finetune.max_steps=null",
        "recipe.stages.finetune.epochs=40",
    )
    process = subprocess.Popen(
        project.command(*words),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: any(
            p.read_text().count("\n") > 3
            for p in project.store.glob("work/train-*/metrics.jsonl")
            if len(project.stages("train")) == 1
        )
    )
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 75, errors
    assert "the same command continues" in errors
    (saved,) = project.store.glob("work/train-*/checkpoints/checkpoint-*")
    step = int(saved.name.split("-")[1])
    done = project.train(*words)
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line)["step"]
        for line in (project.model("finetune").parents[1] / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < step < rows[-1]
    assert rows == sorted(set(rows)), "no step is logged twice"


@pytest.mark.parametrize(
    ("launch", "where"),
    [
        ("local", "loss"),
        ("torchrun", "loss"),
        pytest.param("zero2", "loss", marks=pytest.mark.slow),
        pytest.param("zero3", "loss", marks=pytest.mark.slow),
        pytest.param("zero2", "gradient", marks=pytest.mark.slow),
        pytest.param("zero3", "gradient", marks=pytest.mark.slow),
    ],
)
def test_a_nan_on_one_rank_stops_the_run_before_any_weight_is_touched(
    launch: str, where: str, project: Project
) -> None:
    (project.root / "planted.py").write_text(NAN_CONNECTOR.replace("WHERE", where))
    words = (
        "connector._target_=planted.PlantedNaN",
        "trust=[planted]",
        f"launch={launch}",
        "launch.micro_batch=8",
        "launch.save_steps=1",
    )
    done = project.train(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "step 3 is not finite; no weight was changed" in done.stderr
    assert f"rank {0 if launch == 'local' else 1}: c" in done.stderr, "the sample ids of that rank's batch are named"
    checkpoints = sorted(project.store.glob("work/train-*/checkpoints/checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    for path in project.store.glob("work/train-*/checkpoints/*/state-*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def ranks(command: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's ranks in a run that is under way, in their order: command, starter, agent, ranks."""
    agents = [agent for starter in psutil.Process(command.pid).children() for agent in starter.children()]
    return sorted(rank.pid for agent in agents for rank in agent.children())


def test_a_killed_rank_ends_the_job_quickly_and_is_named(project: Project) -> None:
    process = subprocess.Popen(
        project.command("launch=torchrun", "recipe.stages.pretrain.epochs=5000"),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(project.store.glob("work/train-*/metrics.jsonl")))
    os.kill(ranks(process)[-1], signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1 and time.monotonic() - killed_at < 90
    assert re.search(r"rank [01] ended with exit code -9 \(SIGKILL: killed from outside", errors), errors


def test_two_processes_on_one_run_do_each_stage_once(project: Project) -> None:
    commands = [
        subprocess.Popen(
            project.command(),
            cwd=project.root,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in commands]
    assert [process.returncode for process in commands] == [0, 0], outputs
    statuses = [
        row["status"]
        for path in project.store.glob("runs/*/run.json")
        for row in json.loads(path.read_text())["stages"]
    ]
    assert sorted(statuses) == ["reused"] * 6 + ["run"] * 6


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_stage_is_named_and_made_again(damage: str, project: Project) -> None:
    assert project.train_here().returncode == 0
    path = project.model("pretrain") / "connector/model.safetensors"
    before = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    done = project.train_here()
    assert done.returncode == 0, done.stderr
    newest = max(project.store.glob("runs/*/log.txt"), key=lambda path: path.stat().st_mtime)
    assert "output/model/connector/model.safetensors" in newest.read_text()
    assert (project.model("pretrain") / "connector/model.safetensors").read_bytes() == before
    assert len(list(project.store.glob("damaged/train-*"))) == 1


@pytest.mark.slow
def test_fifty_launches_at_once_make_fifty_run_folders(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    assert project.train().returncode == 0
    processes = [
        subprocess.Popen(
            project.command(), cwd=project.root, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(50)
    ]
    assert [process.wait(timeout=280) for process in processes] == [0] * 50
    assert len(list(project.store.glob("runs/*/run.json"))) == 51


def test_a_hung_rank_ends_the_job_after_the_step_timeout(project: Project) -> None:
    words = ("launch=torchrun", "recipe.stages.pretrain.epochs=5000", "launch.step_timeout_s=4")
    process = subprocess.Popen(
        project.command(*words),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(p.read_text().count("\n") > 3 for p in project.store.glob("work/train-*/metrics.jsonl")))
    os.kill(ranks(process)[-1], signal.SIGSTOP)
    stopped_at = time.monotonic()
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1 and time.monotonic() - stopped_at < 120
    assert "rank 0 failed" in errors and "rank 1 did not end by itself then and was killed" in errors, errors
