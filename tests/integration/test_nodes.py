"""A stage on several machines without a scheduler: the same command twice, each a machine of its own as far as it knows."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from tests.integration.project import Project, environment, tiny_project
from tests.integration.test_recovery import wait_for

TWO = ("launch=torchrun", "launch.nodes=2", "launch.start_timeout_s=120")


def started(project: Project, *words: str) -> list[subprocess.Popen[str]]:
    """The command on two machines."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command, where = project.command(*TWO, "launch.nproc=1", *words), {"cwd": project.root, "env": environment()}
    return [subprocess.Popen(command, **where, **pipes) for _ in range(2)]  # type: ignore[call-overload]


def losses(project: Project) -> list[float]:
    rows = (project.model("finetune").parents[1] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def test_two_machines_train_as_two_ranks_of_one_stop_together_and_continue(tmp_path: Path) -> None:
    words = ("recipe.stages.finetune.epochs=60",)
    project = tiny_project(tmp_path / "two")
    both = started(project, *words)
    wait_for(
        lambda: (
            any(len(path.read_bytes()) > 3000 for path in project.store.glob("work/train-*/metrics.jsonl"))
            and project.stages("train")
        )
    )
    both[1].send_signal(signal.SIGTERM)  # whichever it is, leader or not
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [75, 75], said
    assert [*project.store.glob("work/train-*/checkpoints/checkpoint-*")]

    both = started(project, *words)
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting" in output for output, _ in said) >= 1
    log = (project.model("finetune").parents[1] / "log.txt").read_text()
    assert "resuming from" in log and "rank 1" in log

    alone = tiny_project(tmp_path / "one")
    done = alone.train("launch=torchrun", "launch.nproc=2", *words)
    assert done.returncode == 0, done.stderr
    assert losses(project) == losses(alone)
