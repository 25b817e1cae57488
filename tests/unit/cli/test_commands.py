"""The commands answer quickly and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.project import environment, tiny_project


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_train_help_lists_groups_and_exit_codes(tmp_path: Path) -> None:
    done = run("tinylmm.cli.train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("vision_tower", "phi2", "zero3", "Exit codes", "llm=phi2 vt=siglip recipe=share"):
        assert word in done.stdout


def test_tinylmm_help_lists_the_commands(tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("plan", "verify", "doctor", "runs", "report", "score", "store"):
        assert word in done.stdout


def test_plan_prints_json_from_any_folder(tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", "plan", "vt=nano", "--json", cwd=tmp_path)
    assert done.returncode == 0 and set(json.loads(done.stdout)) >= {"runs", "stages", "totals"}
    assert list(tmp_path.iterdir()) == []


def test_plan_as_a_table_says_what_is_to_do(tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", "plan", "-m", "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0
    assert "2 runs" in done.stdout and "todo" in done.stdout


def test_a_plan_says_what_each_training_takes(tmp_path: Path) -> None:
    words = ("llm=phi2", "vt=siglip", "eval=none", "launch.gpu=rtx4090", "launch.price=0.5")
    done = run("tinylmm.cli.main", "plan", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    # how many positions fit is what the memory plan was fitted to (tests/unit/planning); here it must be told, and alike
    plan = json.loads(run("tinylmm.cli.main", "plan", *words, "--json", cwd=tmp_path).stdout)
    rows = plan["estimate"]["stages"][0]["chosen"]["row_tokens"]
    assert 4_096 < rows <= 20_480 and rows % 1_024 == 0
    for words_said in (
        "llm: 2.78G of 2.78G parameters trained",
        f"launched with rows of {rows:,} positions, local x1: ",
        f"(chosen: row_tokens {rows}, gradient_checkpointing False)",
        "does not fit; launch=zero2 launch.nproc=4 fits: ",
        "in money on NVIDIA GeForce RTX 4090",
        "as published (phi2's YAML)",
        "assumed: tokens and images",
    ):
        assert words_said in said


def test_a_sweep_tells_trainings_of_one_name_apart(tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", "plan", "-m", "seed=1,2", "recipe=base,share", cwd=tmp_path)
    plan = run("tinylmm.cli.main", "plan", "-m", "seed=1,2", "recipe=base,share", "--json", cwd=tmp_path)
    rows = json.loads(plan.stdout)["estimate"]["stages"]
    assert len(rows) == 8
    assert all(row["digest"][:8] in done.stdout for row in rows)


def test_doctor_says_why_a_fast_path_is_off(tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fast paths:" in done.stdout and "packing" in done.stdout and "GiB free" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_hydra_shows_the_composed_config(tmp_path: Path) -> None:
    done = run("tinylmm.cli.train", "--cfg", "job", "llm=phi2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "transformers.PhiForCausalLM" in done.stdout


@pytest.mark.parametrize("words", [("plan", "--bogus"), ("store", "ls"), ("runs",), ("report",)], ids=" ".join)
def test_wrong_use_exits_2_with_one_message(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run("tinylmm.cli.main", *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "ascii"])
def test_a_console_of_another_encoding_never_ends_the_work(tmp_path: Path, encoding: str) -> None:
    project = tiny_project(tmp_path)
    words = ("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1")
    done = subprocess.run(
        project.command(*words),
        cwd=project.root,
        env=environment() | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"ok" in done.stdout and project.model("finetune").is_dir()
