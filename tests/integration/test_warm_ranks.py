"""torchrun's ranks are forks of a process that has all loaded: sooner there, and with the results of new processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.project import COLOURS, Project, environment, tiny_project, write_images
from tests.integration.test_recovery import wait_for
from tests.unit.evaluation.benchmarks.disk import write_jsonl
from tinylmm.launch import nodes, starting

WATCHED = """
import os
import psutil
from pathlib import Path
from tinylmm.models.connectors import MLPConnector

with Path(os.environ["RANKS_SEEN"]).open("a") as seen:
    kind = next(word for word in psutil.Process().cmdline() if word.startswith("tinylmm.launch."))
    seen.write(f"{kind} {os.getpid()} {os.environ['RANK']}\\n")


class Connector(MLPConnector):
    pass
"""
ON_A_GPU = """
import sys
from tinylmm.cli.train import main
from tinylmm.launch import nodes

nodes.has_gpu_driver = lambda: True
main()
"""
SHORT = tuple(f"recipe.stages.{stage}.max_steps=2" for stage in ("pretrain", "finetune"))
WORDS = (*SHORT, "launch.nproc=2", "launch.save_steps=1", "connector._target_=watched.Connector", "trust=[watched]")
KINDS_OF_STAGES = ("train", "train", "eval")


def asking_project(root: Path) -> Project:
    """A tiny project with twelve questions in a benchmark, and a connector that notes the processes that load it."""
    made = tiny_project(root)
    (root / "watched.py").write_text(WATCHED)
    names = write_images(root / "shapes/images")
    asked = {"text": "Which colour?", "category": "colour", "answer": "red", "options": len(COLOURS)}
    write_jsonl(
        root / "shapes/test.jsonl", [{"question_id": n, "image": name, **asked} for n, name in enumerate(names)]
    )
    words = [word for word in made.words if word != "eval=none"]
    words += ["eval=gqa", "eval.gqa.benchmark=digits", f"eval.gqa.root={root / 'shapes'}", "eval.gqa.max_new_tokens=3"]
    return Project(root, (*words, *WORDS))


def result(project: Project) -> dict[str, torch.Tensor | str]:
    """Every tensor that was trained, every loss, every answer."""
    found: dict[str, torch.Tensor | str] = {}
    for name in ("pretrain", "finetune"):
        for path in project.model(name).rglob("*.safetensors"):
            found |= {f"{name}/{path.parent.name}/{key}": tensor for key, tensor in load_file(path).items()}
        rows = (project.model(name).parents[1] / "metrics.jsonl").read_text().splitlines()
        found[f"{name}/losses"] = str([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    (asked,) = project.stages("eval")
    answers = [json.loads(line) for line in (asked / "output/generations.jsonl").read_text().splitlines()]
    assert len(answers) == 12 and any(answer["text"] for answer in answers)
    return found | {f"answer {one['item_id']}": f"{one['text']!r}, {one['score']}" for one in answers}


@pytest.mark.parametrize("launch", ["torchrun", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_stages_on_forked_ranks_give_the_bits_of_stages_on_new_ones(
    launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(starting, "_running", [])
    seen, results = {}, {}
    for how in ("starter", "worker"):
        project = asking_project(tmp_path / how)
        monkeypatch.setenv("RANKS_SEEN", str(tmp_path / f"{how}.txt"))
        # A machine with a GPU of which copies can make no use: this one has no CUDA.
        monkeypatch.setattr(nodes, "has_gpu_driver", lambda how=how: how == "worker")
        done = project.train_here(f"launch={launch}")
        assert done.returncode == 0, done.stdout + done.stderr
        seen[how] = [line.split() for line in (tmp_path / f"{how}.txt").read_text().splitlines()]
        results[how] = result(project)
    for how, ranks in seen.items():
        assert {kind for kind, *_ in ranks} == {f"tinylmm.launch.{how}"}, "what a rank was begun as"
        assert len({pid for _, pid, _ in ranks}) == 2 * len(KINDS_OF_STAGES), "no process serves two stages"
        assert sorted(rank for *_, rank in ranks) == sorted(["0", "1"] * len(KINDS_OF_STAGES))
    found, expected = results["starter"], results["worker"]
    assert found.keys() == expected.keys() and len(found) > 80
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_where_copies_can_start_cuda_ranks_are_copies_that_load_what_would_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver.c").write_text("int cuInit(unsigned flags) { return 0; }")  # all that is asked of a driver
    subprocess.run(["cc", "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    project = asking_project(tmp_path / "project")
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU, *project.words, "launch=torchrun"],
        cwd=project.root,
        env=environment() | {"LD_LIBRARY_PATH": str(tmp_path), "RANKS_SEEN": str(tmp_path / "seen.txt")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = (tmp_path / "seen.txt").read_text().splitlines()
    assert {line.split()[0] for line in ranks} == {"tinylmm.launch.starter"} and len(ranks) == 2 * len(KINDS_OF_STAGES)
    assert "each rank loads the libraries itself" not in (project.model("finetune").parents[1] / "log.txt").read_text()


def test_a_run_whose_starter_is_killed_says_so_and_leaves_nothing_running(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    command = subprocess.Popen(
        project.command("launch=torchrun", "launch.nproc=2", "recipe.stages.pretrain.epochs=5000"),
        cwd=project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(project.store.glob("work/train-*/metrics.jsonl")))
    everyone = psutil.Process(command.pid).children(recursive=True)
    assert len(everyone) >= 4, "starter, agent, two ranks"
    os.kill(everyone[0].pid, signal.SIGKILL)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "the process that starts stages ended with exit code -9 (SIGKILL: killed from outside" in errors, errors
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
