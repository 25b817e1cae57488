"""docs/studies.md: its study composes, and its commands find the runs of it that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tinylmm.cli.report import report
from tinylmm.config.compose import compose_all

from .conftest import StoreBuilder
from .sweeps import add_run

PAGE = (Path(__file__).parents[3] / "docs" / "studies.md").read_text(encoding="utf-8").partition("\n## Searching")[0]
FILES = re.compile(r"^```\w+ title=(\S+)\n(.*?)^```", re.M | re.S)
COMMANDS = re.compile(r"^(tinylmm-train|tinylmm plan|tinylmm report) (.*)$", re.M)

APP = typer.Typer()
APP.command()(report)


def test_the_pages_study_runs_through_its_report(
    store: StoreBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in FILES.findall(PAGE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = dict(COMMANDS.findall(PAGE))
    assert list(commands) == ["tinylmm plan", "tinylmm-train", "tinylmm report"]
    runs = compose_all(shlex.split(commands["tinylmm-train"]), multirun=True)
    assert len(runs) == 12
    store.images()
    for number, (_, spec) in enumerate(runs):
        add_run(store, f"run-{number}", spec.model_dump(mode="json"), 0.5, luck=number)
    result = CliRunner().invoke(APP, [*shlex.split(commands["tinylmm report"]), "--store", str(store.root)])
    assert result.exit_code == 0, result.exception
    made = {str(path.relative_to("paper/which_part")) for path in Path("paper/which_part").rglob("*") if path.is_file()}
    promised = {"report.html", "report.md", "results.json", *re.findall(r"^\| `([^`*]+)`", PAGE, re.M)}
    assert promised <= made and "figures/bars-llm.pdf" in made
    header = next(line for line in result.stdout.splitlines() if "Connector" in line)
    assert all(word in header for word in ("LLM", "seeds", "digits accuracy", "95 %", "alike"))
