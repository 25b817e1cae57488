"""A stage on several machines without a scheduler: the same command twice, each a machine of its own as far as it knows.

Commands, agents and ranks are forks of one process that has the libraries imported (`kill_harness`): ten processes that import
them for themselves would take most of this test's time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.kill_harness import FORKED, Attempt, ForkedTorchrun, import_libraries
from tests.integration.project import Project, environment, tiny_project
from tests.integration.test_recovery import wait_for
from tinylmm.config.launch import LaunchSpec
from tinylmm.launch import nodes

WORDS = (
    *("launch=torchrun", "launch.start_timeout_s=120", "recipe.stages.finetune.epochs=30"),
    *(f"launch.backend={FORKED}", "trust=[tests]"),
)
TWO = [*WORDS, "launch.nodes=2", "launch.nproc=1"]


def losses(project: Project) -> list[float]:
    rows = (project.model("finetune").parents[1] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def two_machines(folder: Path) -> None:
    """Train on two of them, stop and go on, and compare with two ranks of one."""
    project = tiny_project(folder / "two")
    log = project.root / "attempts.log"
    both = [Attempt(project, TWO, real=False) for _ in range(2)]
    wait_for(
        lambda: (
            any(len(path.read_bytes()) > 3000 for path in project.store.glob("work/train-*/metrics.jsonl"))
            and project.stages("train")
        )
    )
    both[1].process.send_signal(signal.SIGTERM)  # whichever it is, leader or not
    assert [attempt.process.wait(120) for attempt in both] == [75, 75], log.read_text()
    assert [*project.store.glob("work/train-*/checkpoints/checkpoint-*")]

    before = log.stat().st_size
    both = [Attempt(project, TWO, real=False) for _ in range(2)]
    assert [attempt.process.wait(240) for attempt in both] == [0, 0], log.read_text()
    assert b"waiting" in log.read_bytes()[before:]
    stage = project.model("finetune").parents[1]
    assert "resuming from" in (stage / "log.txt").read_text()
    assert '"world_size": 2' in (stage / "manifest.json").read_text()

    alone = tiny_project(folder / "one")
    attempt = Attempt(alone, [*WORDS, "launch.nproc=2"], real=False)
    assert attempt.process.wait(240) == 0, attempt.said()
    assert losses(project) == losses(alone)


def test_two_machines_train_as_two_ranks_of_one_stop_together_and_continue(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.test_nodes", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def fork_agent(folder: Path, launch: LaunchSpec, words: list[str]) -> Any:
    """For `nodes.start_agent`: the agent of a machine that joins."""
    return ForkedTorchrun(launch)._spawn(folder, words)


if __name__ == "__main__":
    import_libraries()
    nodes.start_agent = fork_agent
    two_machines(Path(sys.argv[1]).resolve())
