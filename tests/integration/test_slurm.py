"""Stages as jobs of SLURM: the same tests with SLURM itself, where it can run, and with its emulation."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.project import Project, environment, tiny_project
from tests.integration.slurm import clusters
from tinylmm.errors import UserError
from tinylmm.launch.slurm_jobs import _plan_again
from tinylmm.store.queue import queued
from tinylmm.store.runs import read_run

CLUSTER = ("launch=slurm", "launch.device=cpu", "launch.start_timeout_s=120")
LONG = ("recipe.stages.finetune.epochs=150", "launch.save_steps=50")
"""Ten seconds of training: time enough to meet it at work."""
PATIENCE = 240.0
KINDS = [
    pytest.param("emulated"),
    pytest.param(
        "real", marks=[pytest.mark.slow, pytest.mark.skipif(bool(why := clusters.why_not_real()), reason=why or "")]
    ),
]


@pytest.fixture(params=KINDS)
def cluster(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    start = {"emulated": clusters.emulated, "real": clusters.real}[request.param]
    with start(tmp_path / "cluster") as names:
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        yield request.param


@pytest.fixture
def project(tmp_path: Path, cluster: str) -> Project:
    return tiny_project(tmp_path / "project")


def started(project: Project, *words: str) -> tuple[subprocess.Popen[str], Path]:
    """Give the command; returns it and its run's folder once all is queued."""
    process = subprocess.Popen(
        project.command(*CLUSTER, *words),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if "go on without this command" in line:
            name = line.split("--cancel ")[1].split()[0]
            return process, project.store / "runs" / name
    raise AssertionError(process.communicate())


def runs_command(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinylmm.cli.main", "runs", *words]
    wide = environment() | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=project.root, env=wide, capture_output=True, text=True, check=False)


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.2)
    raise TimeoutError(what)


def ended(run: Path) -> bool:
    return read_run(run).status != "running"


def job_of(run: Path, name: str) -> str:
    record = read_run(run)
    (digest,) = [row.digest for row in record.stages if row.kind == "train" and row.name == name]
    return str(record.jobs[digest])


def steps(project: Project) -> list[dict[str, Any]]:
    """Rows of the training under way."""
    paths = [*project.store.glob("work/train-*/metrics.jsonl")]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]


def losses(stage: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_stages_are_jobs_that_need_no_one_and_the_same_command_finds_them_done(project: Project) -> None:
    follower, run = started(project, "launch.nodes=2", "launch.slurm.limit=1")
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=60)
    assert follower.returncode == 75 and "go on without this command" in errors
    listed = runs_command(project).stdout
    assert "running" in listed and "jobs" in listed
    wait_for(lambda: ended(run))
    record = read_run(run)
    assert record.status == "done" and {row.status for row in record.stages} == {"run"}
    wait_for((project.store / "reports" / run.name / "report.html").exists)
    manifests = [json.loads(path.read_text()) for path in project.store.glob("stages/*/manifest.json")]
    worked = sorted((manifest["started"], manifest["finished"]) for manifest in manifests)
    assert len(worked) == 6 and all(end <= begin for (_, end), (begin, _) in pairwise(worked)), "one job at a time"

    logs = "".join(path.read_text() for path in project.store.glob("stages/train-*/log.txt"))
    assert "rank 1" in logs  # a rank on each of two machines
    local = tiny_project(project.root / "alone")
    alone = Project(local.root, (*project.words,)).train(*["launch=torchrun", "launch.nproc=2", "launch.device=cpu"])
    assert alone.returncode == 0, alone.stderr
    for here, there in zip(project.stages("train"), sorted((local.root / "store/stages").glob("train-*")), strict=True):
        assert here.name == there.name and losses(here) == losses(there)

    again = project.train(*CLUSTER)
    assert again.returncode == 0 and "queued" not in again.stdout, again.stderr


def test_what_slurm_refuses_leaves_nothing_queued(project: Project) -> None:
    refused = project.train(*CLUSTER, "launch.slurm.partition=nowhere")
    assert refused.returncode == 2 and "SLURM refuses a job" in refused.stderr and "partition" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    (run,) = (project.store / "runs").iterdir()
    assert read_run(run).status == "failed"


def test_a_stage_that_fails_takes_its_descendants_from_the_queue_and_is_named(project: Project) -> None:
    (project.root / "data/images/0-red.png").write_bytes(b"no picture")
    failed = project.train(*CLUSTER)
    assert failed.returncode == 1 and "0-red.png" in failed.stderr and "log:" in failed.stderr, failed.stderr
    (run,) = (project.store / "runs").iterdir()
    statuses = {(row.kind, row.name): row.status for row in read_run(run).stages}
    assert statuses["prepare", "prepare[pretrain]"] == "failed" and statuses["train", "finetune"] == "todo"


def test_a_cancelled_run_saves_what_it_has_and_continues(project: Project) -> None:
    follower, run = started(project, *LONG)
    wait_for(lambda: len(steps(project)) > 20 and steps(project)[-1]["steps"] > 200)
    cancelled = runs_command(project, "--cancel", run.name)
    assert cancelled.returncode == 0 and "ended" in cancelled.stdout, cancelled.stderr
    _, errors = follower.communicate(timeout=60)
    assert follower.returncode == 75 and "the same command continues" in errors
    assert read_run(run).status == "stopped"
    assert wait_for(lambda: [*project.store.glob("work/train-*/checkpoints/checkpoint-*")])
    wait_for(lambda: not [*project.store.glob("claims/train-*.json")])
    done = project.train(*CLUSTER, *LONG)
    assert done.returncode == 0, done.stderr
    log = next(
        path
        for path in project.stages("train")
        if json.loads((path / "manifest.json").read_text())["name"] == "finetune"
    )
    assert "resuming from" in (log / "log.txt").read_text()


def preempt(cluster: str, job: str) -> None:
    """Take a job's place away for one that comes first, and give it back."""
    if cluster == "real":
        wish = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
        subprocess.run(wish, check=True)
    else:
        subprocess.run(["scontrol", "requeue", job], check=True)


@pytest.mark.slow
def test_a_preempted_stage_saves_and_goes_on_when_it_is_started_again(project: Project, cluster: str) -> None:
    follower, run = started(project, *LONG, "launch.nproc=2")
    job = job_of(run, "finetune")
    wait_for(lambda: len(steps(project)) > 20 and steps(project)[-1]["steps"] > 200)
    preempt(cluster, job)
    wait_for(lambda: (queued([job]) or {}).get(job) != "RUNNING")
    assert follower.wait(PATIENCE) == 0, follower.communicate()
    record = read_run(run)
    assert record.status == "done" and {row.status for row in record.stages} == {"run"}
    (log,) = [
        path.read_text() for path in project.store.glob("stages/train-*/log.txt") if "resuming" in path.read_text()
    ]
    assert "saving and stopping" in log


@pytest.mark.slow
def test_a_stage_that_runs_out_of_time_is_queued_again_and_continues(project: Project) -> None:
    limit = ["launch.slurm.hours=0.034", "launch.slurm.warn_minutes=1.5"]  # two minutes, with half a minute of work
    words = ["recipe.stages.finetune.epochs=900", "launch.save_steps=50", *limit]
    follower, run = started(project, *words)
    assert follower.wait(600) == 0, follower.communicate()
    assert read_run(run).status == "done"
    (log,) = [
        path.read_text() for path in project.store.glob("stages/train-*/log.txt") if "resuming" in path.read_text()
    ]
    assert log.count("resuming from") >= 1 and "SIGUSR2 received: saving and stopping" in log


def test_a_job_whose_files_have_changed_since_it_was_queued_says_so(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    assert (
        project.train_here("recipe.stages.finetune.max_steps=1", "recipe.stages.pretrain.max_steps=1").returncode == 0
    )
    (run,) = (project.store / "runs").iterdir()
    (prepared,) = [row for row in read_run(run).stages if row.name == "prepare[pretrain]"]
    with contextlib.chdir(project.root):
        assert any(stage.digest == prepared.digest for stage in _plan_again(run, prepared.digest).graph)
        (project.root / "data/pretrain.json").write_text("[]")
        with pytest.raises(UserError, match="have changed since it was queued"):
            _plan_again(run, prepared.digest)
