"""Kills tinylmm-train at random moments and inside checkpoint saves, gives the same command again, and compares weights.

    python -m tests.integration.kill_harness FOLDER TRIALS SEED [RANKS]

Prints one JSON object: trials, kills inside a save, runs that needed a manual step, runs whose weights differ from those of
an uninterrupted run. Every attempt is a fork of this process, which has the libraries imported: a second, not ten.
With RANKS=2 the training stages run on two gloo ranks (forked instead of started by torchrun, to the same entry point), and
a kill hits one of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tinylmm.stages.evaluate
import tinylmm.stages.prepare
import tinylmm.stages.train  # noqa: F401  (imported before the forks)
from tests.integration.project import Project, tiny_project
from tinylmm.cli.errors import guarded
from tinylmm.cli.train import run
from tinylmm.config.spec import LaunchSpec
from tinylmm.errors import StageFailedError
from tinylmm.launch import worker
from tinylmm.launch.backends import torchrun
from tinylmm.stages.job import StageJob

MAX_ATTEMPTS = 4
FORKED = "tests.integration.kill_harness.ForkedRanks"
STAGING = "work/train-*/checkpoints/staging/checkpoint-*"


def attempt(project: Project, store: Path, kill: Callable[[int], None] | None, words: list[str]) -> int:
    """Run the command in a fork; `kill` may end it. Returns the exit code, -9 if killed."""
    log = project.root / "attempts.log"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(project.root)
        code = guarded(lambda: run([*project.words, f"store={store}", "launch.save_steps=1", *words]))
        sys.stdout.flush()
        os._exit(code)
    if kill is not None:
        kill(child)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def alive(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    )


def kill_after(seconds: float, victim: Callable[[int], int]) -> Callable[[int], None]:
    def kill(child: int) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and alive(child):
            time.sleep(0.002)
        if alive(child):
            os.kill(victim(child), signal.SIGKILL)

    return kill


def kill_inside_save(store: Path, skip: int, victim: Callable[[int], int], hits: list[bool]) -> Callable[[int], None]:
    """Kill while a checkpoint lies in the staging folder, after `skip` other saves."""

    def kill(child: int) -> None:
        seen: set[str] = set()
        while alive(child):
            for staged in glob(str(store / STAGING)):  # noqa: PTH207 (unlike Path.glob it bears folders that vanish)
                seen.add(staged)
                if len(seen) > skip:
                    os.kill(victim(child), signal.SIGKILL)
                    hits.append(True)
                    return

    return kill


class ForkedRanks:
    """Stand-in for torchrun: two forks that enter the worker as its ranks do."""

    def __init__(self, launch: LaunchSpec) -> None:
        self.running: list[int] = []

    def start(self, job: StageJob[Any]) -> None:
        self.job = job
        for stale in [job.folder / worker.RESULT_FILE, *job.folder.glob(worker.RANK_RESULTS)]:
            stale.unlink(missing_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                sys.argv = ["worker", str(job.folder)]
                worker.main()
            self.running.append(pid)
        (job.folder / "ranks.part").write_text(" ".join(map(str, self.running)))
        (job.folder / "ranks.part").rename(job.folder / "ranks")  # never read half: half a pid is somebody else's

    def poll(self) -> dict[str, Any] | None:
        for pid in list(self.running):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.running.remove(pid)
                if not (self.job.folder / worker.RESULT_FILE).exists():  # what torchrun does when a rank is gone
                    for other in self.running:
                        os.kill(other, signal.SIGKILL)
        if self.running:
            return None
        (self.job.folder / "ranks").unlink()
        (self.job.folder / "log.txt").touch()
        if not (self.job.folder / worker.RESULT_FILE).exists():
            raise StageFailedError("a rank was killed")
        return torchrun._outcome(self.job, 0)

    def stop(self, now: bool = False) -> None:
        """The harness kills, and asks nobody to stop."""


def a_rank(store: Path, draw: random.Random) -> Callable[[int], int]:
    def choose(child: int) -> int:
        for path in glob(str(store / "work/train-*/ranks")):  # noqa: PTH207
            return int(draw.choice(Path(path).read_text().split()))
        return child

    return choose


def weights(store: Path) -> dict[str, torch.Tensor]:
    found = {}
    for stage in store.glob("stages/train-*"):
        name = json.loads((stage / "manifest.json").read_text())["name"]
        for path in (stage / "output/model").rglob("*.safetensors"):
            found |= {f"{name}/{path.parent.name}/{key}": value for key, value in load_file(path).items()}
    return found


def main() -> None:
    folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ranks = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    torch.set_num_threads(1)
    project, draw = tiny_project(folder), random.Random(seed)
    words = ["launch=torchrun", "launch.nproc=2", f"launch.backend={FORKED}", "trust=[tests]"] if ranks == 2 else []
    reference_store = folder / "reference"
    started = time.monotonic()
    assert attempt(project, reference_store, None, words) == 0, (project.root / "attempts.log").read_text()
    duration = time.monotonic() - started
    reference = weights(reference_store)
    result: dict[str, Any] = {"trials": trials, "ranks": ranks, "inside_save": 0, "failed": [], "differing": []}
    for trial in range(trials):
        store = folder / f"store-{trial}"
        victim = a_rank(store, draw) if ranks == 2 and trial % 4 < 3 else (lambda child: child)
        hits: list[bool] = []
        if trial % 2:
            kill = kill_after(draw.uniform(0.05, duration), victim)
        else:
            kill = kill_inside_save(store, draw.randrange(12), victim, hits)
        code = attempt(project, store, kill, words)
        for _ in range(MAX_ATTEMPTS):
            if code == 0:
                break
            code = attempt(project, store, None, words)
        result["inside_save"] += len(hits)
        if code != 0:
            result["failed"].append(trial)
        elif (found := weights(store)).keys() != reference.keys() or any(
            not torch.equal(found[name], reference[name]) for name in reference
        ):
            result["differing"].append(trial)
    result["tensors"] = len(reference)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
