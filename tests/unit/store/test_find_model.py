"""A model is found by its folder, its stage, its run, or the run's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.errors import IntegrityError, UserError
from tinylmm.store.find_model import find_model
from tinylmm.store.integrity import mark_complete, write_manifest


def finished_stage(store: Path, key: str) -> Path:
    model = store / "stages" / key / "output/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "tinylmm"}')
    write_manifest(store / "stages" / key, {"name": key})
    mark_complete(store / "stages" / key)
    return model


def write_run(store: Path, name: str, keys: list[str]) -> Path:
    folder = store / "runs" / name
    folder.mkdir(parents=True)
    stages = [{"kind": key.split("-")[0], "name": key, "key": key, "digest": key} for key in keys]
    (folder / "run.json").write_text(json.dumps({"name": name, "status": "done", "created": "2026", "stages": stages}))
    return folder


def test_all_the_ways_to_name_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    finished_stage(store, "train-1")
    last = finished_stage(store, "train-2")
    run = write_run(store, "mine", ["prepare-0", "train-1", "train-2", "eval-3"])
    assert find_model(last) == last
    assert find_model(last.parent) == last  # the stage's output folder
    assert find_model(str(store / "stages/train-2")) == last
    assert find_model(run) == last
    assert find_model("mine", store) == last
    monkeypatch.setenv("TINYLMM_STORE", str(store))
    assert find_model("mine") == last


def test_what_stands_for_no_model_says_why(tmp_path: Path) -> None:
    store = tmp_path / "store"
    model = finished_stage(store, "train-1")
    with pytest.raises(UserError, match=r"neither a folder nor the name of a run"):
        find_model("nothing", store)
    with pytest.raises(UserError, match="has no finished training"):
        find_model(write_run(store, "young", ["train-9"]))
    (tmp_path / "llava").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        find_model(tmp_path / "llava")
    (tmp_path / "llava/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=r"model_type is 'llava'.*tinylmm import"):
        find_model(tmp_path / "llava")
    (model / "config.json").unlink()
    with pytest.raises(IntegrityError, match=r"config\.json is missing"):
        find_model(store / "stages/train-1")
