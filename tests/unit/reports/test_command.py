"""cli/report.py: what `tinylmm report` prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from tinylmm.cli.report import report
from tinylmm.config.compose import compose_all
from tinylmm.errors import UserError

from .conftest import StoreBuilder
from .sweeps import add_run

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


SWEEP = ["recipe=base,lora", "seed=0,1", "eval.digits.limit=60"]


def swept(store: StoreBuilder, *left_out: int) -> list[str]:
    """Runs of the sweep that these words ask for, by specs as Hydra composes them."""
    store.images()
    names = []
    for number, (_, spec) in enumerate(compose_all(SWEEP, multirun=True)):
        if number not in left_out:
            names.append(f"run-{number}")
            add_run(store, names[-1], spec.model_dump(mode="json"), 0.5 + 0.05 * number, luck=number)
    return names


def test_a_sweep_is_found_by_its_words(store: StoreBuilder) -> None:
    swept(store)
    add_run(store, "another", {"llm.name": "other"}, 0.5)
    result = CliRunner().invoke(APP, [*SWEEP, "launch.slots=2", "--store", str(store.root), "--json"])
    assert result.exit_code == 0, result.exception
    record = json.loads(result.stdout)
    assert {row["run"] for row in record["rows"]} == {"run-0", "run-1", "run-2", "run-3"}
    assert {"latex", "csv"} <= record["files"].keys()
    assert "Recipe" in CliRunner().invoke(APP, [*SWEEP, "--store", str(store.root)]).stdout


def test_of_a_sweep_that_is_not_whole_the_rest_is_reported_and_the_hole_named(store: StoreBuilder) -> None:
    swept(store, 1)
    result = CliRunner().invoke(APP, [*SWEEP, "--store", str(store.root), "--json"])
    assert {row["run"] for row in json.loads(result.stdout)["rows"]} == {"run-0", "run-2", "run-3"}
    assert "1 of 4 runs that these words ask for have not ended" in result.stderr


def test_words_that_no_run_was_asked_for_are_a_users_fault(store: StoreBuilder) -> None:
    swept(store)
    result = CliRunner().invoke(APP, ["recipe=share", "--store", str(store.root)])
    assert isinstance(result.exception, UserError)
    assert "is one of the 1 that these words ask for" in str(result.exception)


def test_command_module_imports_no_torch_and_no_matplotlib() -> None:
    code = "import sys, tinylmm.cli.report; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
