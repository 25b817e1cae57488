"""`tinylmm store` and `tinylmm runs` say what is there, name what is damaged, and delete only when told to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from tinylmm.cli.store import app, runs
from tinylmm.errors import UserError
from tinylmm.store.claims import claim
from tinylmm.store.integrity import mark_complete, write_manifest
from tinylmm.store.runs import StageRow, create_run
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

RUNS_APP = typer.Typer()
RUNS_APP.command("runs")(runs)


def publish(store: Store, name: str) -> Stage:
    stage = Stage.of("prepare", name, 1, {"name": name}, {}, {})
    (store.begin(stage) / "output/a.bin").write_bytes(bytes(1000))
    store.publish(stage, {}, time.time())
    return stage


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def used(store: Store) -> Stage:
    """A stage that the run `mine` refers to."""
    stage = publish(store, "prepare[pretrain]")
    create_run(store.root, "base", "mine", stages=[StageRow(stage.kind, stage.name, stage.digest, stage.key, "run")])
    return stage


def call(store: Store, *arguments: str, of: typer.Typer = app) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(of, [*arguments, "--store", str(store.root)])


def test_ls_lists_stages_with_their_runs(store: Store, used: Stage) -> None:
    result = call(store, "ls")
    assert result.exit_code == 0
    for text in (used.key, "prepare[pretrain]", "complete", "mine"):
        assert text in result.stdout


def test_a_narrow_terminal_does_not_cut_names_off(store: Store, used: Stage) -> None:
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["ls", "--store", str(store.root)])
    assert used.key in result.stdout


def test_ls_as_json_is_what_the_store_says(store: Store, used: Stage) -> None:
    rows = json.loads(call(store, "ls", "--json").stdout)
    assert rows == [{**vars(row), "runs": list(row.runs)} for row in store.ls()]
    assert [(row["key"], row["runs"]) for row in rows] == [(used.key, ["mine"])]


def test_verify_of_whole_stages_ends_with_0(store: Store, used: Stage) -> None:
    result = call(store, "verify")
    assert (result.exit_code, result.stdout) == (0, "1 folders checked: all whole\n")


def test_verify_names_every_damaged_file_on_a_line_of_its_own_and_ends_with_1(store: Store, used: Stage) -> None:
    other = publish(store, "other")
    altered = store.folder(used) / "output/a.bin"
    altered.write_bytes(bytes(999) + b"x")
    missing = store.folder(other) / "spec.json"
    missing.unlink()
    result = call(store, "verify")
    assert result.exit_code == 1
    assert "2 of 2 folders damaged" in result.stdout
    assert any(line.startswith(f"{altered} has SHA-256") for line in result.stdout.splitlines())
    assert f"{missing} is missing." in result.stdout.splitlines()


def test_verify_quick_reads_no_file(store: Store, used: Stage) -> None:
    (store.folder(used) / "output/a.bin").write_bytes(bytes(999) + b"x")
    assert call(store, "verify", "--quick").exit_code == 0


def test_verify_of_one_stage_leaves_the_others(store: Store, used: Stage) -> None:
    (store.folder(publish(store, "other")) / "output/a.bin").unlink()
    assert call(store, "verify", used.key).exit_code == 0


def test_verify_of_an_unknown_stage_is_the_users_fault_with_a_suggestion(store: Store, used: Stage) -> None:
    result = call(store, "verify", used.key[:-1])
    assert isinstance(result.exception, UserError)
    assert f"Did you mean '{used.key}'?" in str(result.exception)


def test_verify_leaves_a_stage_alone_that_is_being_worked_on(store: Store, used: Stage) -> None:
    (store.folder(used) / "COMPLETE").unlink()
    with claim(store.root, used.key):
        result = call(store, "verify")
    assert result.exit_code == 0
    assert f"{used.key} is being worked on" in result.stdout


def test_gc_deletes_only_with_yes_and_only_what_no_run_uses(store: Store, used: Stage) -> None:
    unused = publish(store, "unused")
    shown = call(store, "gc")
    assert shown.exit_code == 0
    assert f"stages/{unused.key}" in shown.stdout
    assert used.key not in shown.stdout
    assert "Nothing was deleted; add --yes" in shown.stdout
    assert store.is_complete(unused)
    deleted = call(store, "gc", "--yes")
    assert "freed." in deleted.stdout
    assert [store.status(stage) for stage in (used, unused)] == ["complete", "todo"]
    assert "Nothing to delete" in call(store, "gc", "--yes").stdout


def test_runs_are_listed_with_progress_and_what_is_wrong(store: Store, used: Stage) -> None:
    (store.root / "runs/bad").mkdir()
    result = call(store, of=RUNS_APP)
    assert result.exit_code == 0
    for text in ("mine", "running", "1/1", "process ", "bad", "unreadable", "run.json cannot be read"):
        assert text in result.stdout
    names = [run["name"] for run in json.loads(call(store, "--json", of=RUNS_APP).stdout)]
    assert sorted(names) == ["bad", "mine"]


@pytest.mark.parametrize("command", ["ls", "verify", "gc", "runs"])
def test_a_missing_store_is_said_and_not_made(store: Store, command: str) -> None:
    result = call(store, of=RUNS_APP) if command == "runs" else call(store, command)
    assert isinstance(result.exception, UserError)
    assert result.exception.exit_code == 2
    assert f"there is no store at {store.root}" in str(result.exception)
    assert not store.root.exists()


def test_the_store_is_found_by_environment_variable(store: Store, used: Stage) -> None:
    result = CliRunner(env={"TINYLMM_STORE": str(store.root)}).invoke(app, ["ls", "--json"])
    assert [row["key"] for row in json.loads(result.stdout)] == [used.key]


def test_verify_checks_features_too(store: Store, used: Stage) -> None:
    folder = store.root / "features/abc"
    folder.mkdir(parents=True)
    (folder / "features.bin").write_bytes(bytes(100))
    write_manifest(folder, {"images": 1})
    mark_complete(folder)
    assert call(store, "verify").stdout == "2 folders checked: all whole\n"
    (folder / "features.bin").write_bytes(bytes(99) + b"x")
    assert f"{folder / 'features.bin'} has SHA-256" in call(store, "verify", "abc").stdout
