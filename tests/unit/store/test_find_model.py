"""A model is found by its folder, its stage, its run, or the run's name: by one rule, whoever asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tinylmm.config import from_model
from tinylmm.errors import IntegrityError, UserError
from tinylmm.store.find_model import find_model
from tinylmm.store.integrity import mark_complete, write_manifest


def model(folder: Path, kind: str = "tinylmm") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def finished_stage(store: Path, key: str) -> Path:
    found = model(store / "stages" / key / "output/model")
    write_manifest(store / "stages" / key, {"name": key})
    mark_complete(store / "stages" / key)
    return found


def write_run(store: Path, name: str, keys: list[str], status: str = "done") -> Path:
    folder = store / "runs" / name
    folder.mkdir(parents=True)
    stages = [{"kind": key.split("-")[0], "name": f"name of {key}", "key": key, "digest": key} for key in keys]
    record = {"format": 1, "name": name, "status": status, "created": "2026", "stages": stages}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Run `whole` with two trainings, run `stopped` whose last one is unfinished, and models that lie elsewhere."""
    store = tmp_path / "store"
    finished_stage(store, "train-1")
    finished_stage(store, "train-2")
    model(store / "work/train-3/output/model")  # written, not yet published
    write_run(store, "whole", ["prepare-0", "train-1", "train-2", "eval-3"])
    write_run(store, "stopped", ["prepare-0", "train-1", "train-3"], "stopped")
    write_run(store, "young", ["train-9"])
    write_run(store, "data-only", ["prepare-0"])
    (write_run(store, "garbled", []) / "run.json").write_text("{")
    model(tmp_path / "copied/output/model")
    model(tmp_path / "own")
    model(tmp_path / "llava", "llava")
    (tmp_path / "empty").mkdir()
    return store


def by_recipe(where: str, store: Path) -> Path | None:
    """What a recipe takes that names `where`; None where it is refused."""
    seen: list[Path] = []

    def parts(folder: Path) -> dict[str, dict[str, object]]:
        seen.append(folder)
        raise ValueError("these models have no parts")

    original, from_model._parts = from_model._parts, parts  # type: ignore[assignment]
    try:
        from_model.take_parts(OmegaConf.create({"recipe": {"from_model": where}, "store": str(store)}), [])
    finally:
        from_model._parts = original
    return seen[0] if seen else None


NAMED: dict[str, str | None] = {
    "whole": "store/stages/train-2/output/model",
    "{0}/store/runs/whole": "store/stages/train-2/output/model",
    "whole@name of train-1": "store/stages/train-1/output/model",
    "stopped@name of train-1": "store/stages/train-1/output/model",
    "{0}/store/stages/train-1": "store/stages/train-1/output/model",
    "{0}/store/stages/train-1/output": "store/stages/train-1/output/model",
    "{0}/store/stages/train-1/output/model": "store/stages/train-1/output/model",
    "{0}/copied": "copied/output/model",
    "{0}/own": "own",
    "stopped": None,
    "{0}/store/runs/stopped": None,
    "young": None,
    "data-only": None,
    "garbled": None,
    "nowhere": None,
    "whole@nowhere": None,
    "stopped@name of train-3": None,
    "../runs/whole@name of train-1": None,
    "nowhere@name of train-1": None,
    "{0}/store/runs/nowhere": None,
    "{0}/store/work/train-3": None,
    "{0}/store/work/train-3/output/model": None,
    "{0}/llava": None,
    "{0}/empty": None,
}
"""What is named -> the model that is meant, or None where that is refused."""


@pytest.mark.parametrize(("where", "meant"), list(NAMED.items()))
def test_commands_and_recipes_mean_the_same_model(store: Path, tmp_path: Path, where: str, meant: str | None) -> None:
    where = where.format(tmp_path)
    expected = None if meant is None else tmp_path / meant
    try:
        found = find_model(where, store)
    except (UserError, IntegrityError):
        found = None
    assert found == expected
    assert by_recipe(where, store) == expected


def test_a_run_whose_last_training_is_unfinished_names_the_models_that_there_are(store: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_model("stopped", store)
    assert "stopped (stopped) has not finished its last training, name of train-3" in str(caught.value)
    assert f"To use the model that its name of train-1 made, name {store / 'stages/train-1'}" in str(caught.value)


def test_the_store_is_that_of_the_environment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLMM_STORE", str(store))
    assert find_model("whole") == store / "stages/train-2/output/model"


def test_a_run_can_be_named_from_inside_its_folder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store / "runs/whole")
    assert find_model(".", store) == store / "stages/train-2/output/model"


def test_a_folder_of_that_name_that_is_no_model_does_not_hide_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("whole", store) == store / "stages/train-2/output/model"


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("nowhere", UserError, r"neither a folder nor the name of a run .* Runs there: .*whole"),
        ("young", UserError, "has not finished its last training"),
        ("whole@pretrain", UserError, r"no training 'pretrain'\. Its trainings: name of train-1, name of train-2\."),
        ("stopped@name of train-3", UserError, r"\(stopped\) has not finished its training name of train-3"),
        ("data-only", UserError, "trains no model"),
        ("garbled", IntegrityError, r"garbled/run\.json cannot be read"),
        ("{0}/empty", UserError, "holds no model"),
        ("{0}/llava", UserError, r"model_type is 'llava'.*tinylmm import"),
        ("{0}/store/work/train-3", IntegrityError, "COMPLETE is missing: the folder was not finished"),
    ],
)
def test_what_stands_for_no_model_says_why(
    store: Path, tmp_path: Path, where: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_model(where.format(tmp_path), store)


@pytest.mark.parametrize("whole", [False, True], ids=["one file", "the folder"])
def test_a_stage_that_lacks_files_is_named_with_them(store: Path, whole: bool) -> None:
    folder = store / "stages/train-1/output/model"
    folder.rename(store / "moved") if whole else (folder / "config.json").unlink()
    with pytest.raises(IntegrityError, match=r"the stage train-1 cannot be used:\n.*config\.json is missing"):
        find_model(store / "stages/train-1")
