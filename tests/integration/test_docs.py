"""What the documentation pages show is run as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.project import Project, environment, tiny_project

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
FILES = re.compile(r"^```\w+ title=(\S+)\n(.*?)^```", re.M | re.S)
COMMANDS = re.compile(r"^\$ PYTHONPATH=\. (\S+) ?(.*)$", re.M)
PROGRAMS = {"tinylmm": ["-m", "tinylmm.cli.main"], "tinylmm-train": ["-m", "tinylmm.cli.train"], "python": []}
SHORT = ("recipe.stages.pretrain.max_steps=2", "recipe.stages.finetune.max_steps=2")
SECTIONS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
SUFFIXES = {
    "A connector": [".py", ".yaml"],
    "An LLM": [".yaml"],
    "A benchmark": [".py", ".yaml", ".jsonl"],  # the last one is data
    "A checkpoint format": [".py"],
    "A kind of stage": [".py", ".py"],
    "A launch backend": [".py", ".yaml"],
}
"""The files that each thing takes: no more than the page's own table says."""


def follow(section: str, folder: Path) -> Project:
    """Write the files of a section into a project and give its commands there, on the project's data."""
    project = tiny_project(folder)
    for name, text in FILES.findall(SECTIONS[section]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if (folder / "my_lab").is_dir():
        (folder / "my_lab/__init__.py").touch()
    commands = COMMANDS.findall(SECTIONS[section])
    assert commands, f"'{section}' shows no command"
    for program, arguments in commands:
        given = arguments.split()
        groups = tuple(f"{word.partition('=')[0]}." for word in given) + tuple(
            word.partition("=")[0] + "=" for word in given
        )
        script = [given.pop(0)] if program == "python" else []
        subcommand = [given.pop(0)] if program == "tinylmm" else []
        words = [word for word in (*project.words, *SHORT) if not word.startswith(groups)]
        done = subprocess.run(
            [sys.executable, *PROGRAMS[program], *script, *subcommand, *words, *given],
            cwd=folder,
            env=environment() | {"PYTHONPATH": "."},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.mark.parametrize("section", SUFFIXES)
def test_each_thing_takes_the_files_that_the_page_says(section: str) -> None:
    assert [Path(name).suffix for name, _ in FILES.findall(SECTIONS[section])] == SUFFIXES[section]


def test_a_connector_is_added_by_one_class_and_one_yaml(tmp_path: Path) -> None:
    project = follow("A connector", tmp_path)
    assert "GatedConnector" in (project.model("finetune") / "config.json").read_text(encoding="utf-8")


def test_an_llm_is_added_by_one_yaml(tmp_path: Path) -> None:
    project = follow("An LLM", tmp_path)
    assert json.loads((project.model("finetune") / "llm/config.json").read_text())["model_type"] == "qwen2"


def test_a_benchmark_is_added_by_one_module_and_one_yaml(tmp_path: Path) -> None:
    project = follow("A benchmark", tmp_path)
    (evaluated,) = project.stages("eval")
    scores = json.loads((evaluated / "output/scores.json").read_text())
    assert scores["protocol"]["name"] == "colours-exact" and scores["counts"]["scored"] == 3
    shown = [json.loads(line)["truth"] for line in (evaluated / "output/generations.jsonl").read_text().splitlines()]
    assert shown == ["yes", "no", "no"]


def test_a_kind_of_stage_is_added_by_one_row_and_one_body(tmp_path: Path) -> None:
    project = follow("A kind of stage", tmp_path)
    counted = project.stages("count")
    assert len(counted) == 2
    for stage in counted:
        assert json.loads((stage / "output/tokens.json").read_text()) > 10
        assert json.loads((stage / "manifest.json").read_text())["summary"]["tokens"] > 10


def test_a_launch_backend_is_added_by_one_module(tmp_path: Path) -> None:
    project = follow("A launch backend", tmp_path)
    (stage, *_) = project.stages("train")
    assert "rank 0" in (stage / "log.txt").read_text()  # the worker's own process wrote it
    assert project.model("finetune").is_dir()
