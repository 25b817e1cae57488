"""cli/report.py: what `tinylmm report` prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from tinylmm.cli.report import report
from tinylmm.errors import UserError

from .conftest import StoreBuilder

APP = typer.Typer()
APP.command()(report)


def test_command_prints_scores_and_where_the_files_are(store: StoreBuilder) -> None:
    store.whole()
    result = CliRunner().invoke(APP, ["--store", str(store.root)])
    assert result.exit_code == 0
    assert "80.0" in result.stdout
    assert str(store.root / "reports" / "nano-base" / "report.html") in result.stdout


def test_the_store_may_be_named_by_the_environment(store: StoreBuilder) -> None:
    store.whole()
    result = CliRunner().invoke(APP, [], env={"TINYLMM_STORE": str(store.root)})
    assert result.exit_code == 0 and str(store.root / "reports") in result.stdout


def test_json_is_all_that_is_printed_with_json(store: StoreBuilder, tmp_path: Path) -> None:
    store.whole()
    arguments = ["nano-base", "--store", str(store.root), "--json", "--picture", str(tmp_path / "results.png")]
    record = json.loads(CliRunner().invoke(APP, arguments).stdout)
    assert (record["format"], len(record["rows"])) == (1, 10)
    assert all(Path(path).is_file() for path in record["files"].values())


def test_a_users_fault_reaches_the_caller(store: StoreBuilder) -> None:
    result = CliRunner().invoke(APP, ["--store", str(store.root)])
    assert isinstance(result.exception, UserError)


def test_command_module_imports_no_torch_and_no_matplotlib() -> None:
    code = "import sys, tinylmm.cli.report; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
