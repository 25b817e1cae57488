"""Sweeps as one graph: each stage once, side by side, whatever fails, stops or runs beside it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.project import Project, environment
from tests.integration.test_embedded import WORDS as EMBEDDED
from tests.integration.test_recovery import wait_for
from tinylmm.launch import starting
from tinylmm.launch.backends import process
from tinylmm.store import store as store_module
from tinylmm.store.integrity import check_folder

BREAKABLE = '''
from pathlib import Path
from tinylmm.models.connectors import MLPConnector


class Breakable(MLPConnector):
    """Fails to train with three layers for as long as there is a file `broken`."""

    def __init__(self, vision_width, llm_width, depth=2, **options):
        super().__init__(vision_width, llm_width, depth=depth, **options)
        self.depth_asked = depth

    def forward(self, features):
        if self.training and self.depth_asked == 3 and Path("broken").exists():
            raise RuntimeError("made to fail")
        return super().forward(features)
'''
DEPTHS = ("connector._target_=breakable.Breakable", "trust=[breakable]", "connector.options.depth=2,3")


def sweep(project: Project, *words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        project.command("-m", *words),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_rows(store: Path) -> list[dict[str, Any]]:
    """Stages as runs saw them, the oldest run's first."""
    records = sorted(
        (json.loads(path.read_text()) for path in store.glob("runs/*/run.json")), key=lambda r: r["created"]
    )
    return [row | {"of": record["name"], "ended": record["status"]} for record in records for row in record["stages"]]


def trained(store: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every trained model."""
    return {
        f"{path.relative_to(store)}/{name}": tensor
        for path in sorted(store.glob("stages/train-*/output/model/**/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_stages_side_by_side_run_once_each_and_learn_what_they_learn_one_after_another(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-m", "seed=1,2", "recipe.stages.finetune.epochs=1,2")
    found = {}
    for slots in (1, 2):
        done = project.train_here(*words, f"launch.slots={slots}", f"store={project.root / f'store-{slots}'}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 runs ask for 24 stages, 10 of them distinct" in done.stdout
        found[slots] = trained(project.root / f"store-{slots}")
        rows = run_rows(project.root / f"store-{slots}")
        assert sorted(row["status"] for row in rows) == ["reused"] * 14 + ["run"] * 10
        assert {row["ended"] for row in rows} == {"done"}
    assert found[1].keys() == found[2].keys() and len(found[1]) > 6 * 40
    assert all(torch.equal(tensor, found[2][name]) for name, tensor in found[1].items())

    read: Counter[str] = Counter()

    def check(folder: Path, deep: bool = True) -> list[str]:
        read.update([folder.name] if deep else [])
        return check_folder(folder, deep)

    monkeypatch.setattr(store_module, "check_folder", check)
    assert project.train_here(*words, f"store={project.root / 'store-2'}").returncode == 0
    assert sorted(read.values()) == [1] * 10, "what four runs reuse is read once"


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_failed_stage_fails_what_needs_it_and_resumes_alone(slots: int, project: Project) -> None:
    (project.root / "breakable.py").write_text(BREAKABLE)
    (project.root / "broken").touch()
    command = sweep(project, *DEPTHS, f"launch.slots={slots}")
    said, errors = command.communicate(timeout=240)
    assert command.returncode == 1, said + errors
    assert "train pretrain failed with RuntimeError: made to fail" in errors
    (failed,) = project.store.glob("work/train-*")
    assert "made to fail" in (failed / "error.txt").read_text() and "Traceback" in (failed / "error.txt").read_text()
    by_run: dict[str, list[str]] = {}
    for row in run_rows(project.store):
        by_run.setdefault(row["ended"], []).append(row["status"])
    assert sorted(by_run["failed"]) == ["failed", "reused", "reused", "reused", "reused", "todo"]
    assert by_run["done"] == ["run"] * 6
    (project.root / "broken").unlink()
    again = sweep(project, *DEPTHS, f"launch.slots={slots}")
    said, errors = again.communicate(timeout=240)
    assert again.returncode == 0, said + errors
    assert said.count("reused") == 6 and said.count("✓ train") == 4
    assert [line.split()[2] for line in said.splitlines() if "✓" in line and "reused" not in line] == [
        "pretrain",
        "finetune",
    ]


def test_two_sweeps_on_one_store_share_their_stages_and_both_finish(project: Project) -> None:
    commands = [sweep(project, "seed=1,2", "launch.slots=2") for _ in range(2)]
    outputs = [command.communicate(timeout=240) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], outputs
    assert sorted(row["status"] for row in run_rows(project.store)).count("run") == 8
    assert len(list(project.store.glob("stages/*"))) == 8


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL))],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_a_stopped_sweep_leaves_nothing_running_and_continues_from_its_checkpoints(
    number: signal.Signals, project: Project
) -> None:
    words = ("seed=1,2", "launch.slots=2", "launch.save_steps=5", "recipe.stages.pretrain.epochs=100")
    command = sweep(project, *words, start_new_session=True)
    wait_for(lambda: len(steps(project.store)) == 2 and min(steps(project.store)) > 6)
    everyone = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    assert len(everyone) >= 4, "the command, the starter, two stages"
    command.send_signal(number)
    _, errors = command.communicate(timeout=60)
    _, alive = psutil.wait_procs(everyone[1:], timeout=5)
    assert alive == []
    if number != signal.SIGKILL:
        assert command.returncode == 75 and "the same command continues" in errors, errors
    saved = [int(path.name.split("-")[1]) for path in project.store.glob("work/train-*/checkpoints/checkpoint-*")]
    assert len({path.parent for path in project.store.glob("work/train-*/checkpoints/checkpoint-*")}) == 2
    assert max(saved) >= 5
    done = project.train("-m", *words[:2], "recipe.stages.pretrain.epochs=100")
    assert done.returncode == 0, done.stderr
    for path in project.store.glob("stages/train-*/metrics.jsonl"):
        logged = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert logged == sorted(set(logged)), "no step is logged twice"


@pytest.mark.slow
def test_where_there_is_a_gpu_a_stages_process_is_no_copy_of_another(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(starting, "_running", [])
    done = project.train_here("-m", "seed=1,2", "launch.slots=2", "launch.device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(project.stages("train")) == 4


def steps(store: Path) -> list[int]:
    """Of each training under way, how many rows it has written."""
    return [path.read_text().count("\n") for path in store.glob("work/train-*/metrics.jsonl")]


def test_a_worker_that_is_killed_is_named_and_takes_no_other_stage_with_it(project: Project) -> None:
    command = sweep(project, "seed=1,2", "launch.slots=2", "recipe.stages.pretrain.epochs=60")
    wait_for(lambda: len(steps(project.store)) == 2)
    (starter,) = psutil.Process(command.pid).children()
    starter.children()[0].kill()
    said, errors = command.communicate(timeout=240)
    assert command.returncode == 1, said + errors
    assert "ended with exit code -9 (SIGKILL: killed from outside" in errors
    assert sorted({row["of"]: row["ended"] for row in run_rows(project.store)}.values()) == ["done", "failed"]


def tables(store: Path) -> list[dict[str, Any]]:
    """What the newest report says of each run, without its name."""
    newest = max(store.glob("reports/*/results.json"), key=lambda path: path.stat().st_mtime)
    rows = [
        {name: value for name, value in row.items() if name != "run"} for row in json.loads(newest.read_text())["rows"]
    ]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_ten_times_ends_with_the_same_models_and_tables(tmp_path: Path) -> None:
    project = Project(tmp_path, EMBEDDED)
    words = (
        "seed=1,2",
        "connector=linear,mlp",
        "recipe.stages.finetune.epochs=8",
        "launch.slots=2",
        "launch.save_steps=3",
    )
    command = sweep(project, *words, f"store={project.root / 'undisturbed'}")
    assert command.wait(500) == 0, command.communicate()
    draw, hits = random.Random(5), Counter[str]()
    for number in range(10):
        command = sweep(project, *words, start_new_session=True)
        time.sleep(draw.uniform(3.0, 14.0))
        whole = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
        whom = ("parent", "worker", "everything")[number % 3]
        chosen = {"parent": whole[:1], "worker": draw.sample(whole[1:], min(1, len(whole) - 1)), "everything": whole}[
            whom
        ]
        for process_ in chosen:
            with suppress(psutil.NoSuchProcess):
                process_.kill()
                hits[whom] += 1
        command.communicate(timeout=120)
        wait_for(lambda left=whole: not any(one.is_running() and one.status() != "zombie" for one in left), 60)
    assert hits["parent"] >= 3 and hits["worker"] >= 3 and hits["everything"] >= 3
    last = sweep(project, *words)
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, said + errors
    found, expected = trained(project.store), trained(project.root / "undisturbed")
    assert found.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )
    assert tables(project.store) == tables(project.root / "undisturbed") and len(tables(project.store)) > 20
