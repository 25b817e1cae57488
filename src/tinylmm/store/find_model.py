"""Where the model is: a model folder, a stage's folder, a run's folder, or a run's name. No torch here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tinylmm.errors import IntegrityError, UserError
from tinylmm.store.integrity import MARKER_FILE, OUTPUT_FOLDER, check_folder
from tinylmm.store.runs import RUN_FILE

CONFIG_FILE = "config.json"
DEFAULT_STORE = "store"


def find_model(where: str | Path, store: Path | None = None) -> Path:
    """Return the model folder that `where` stands for.

    Args:
        where: a model folder, a stage folder of the store, a run folder (its last trained model), or the name of a run.
        store: where runs are looked for by name; default: TINYLMM_STORE, else ./store.

    Raises:
        UserError: it stands for no model, or for one that has to be imported first.
        IntegrityError: the stage is unfinished, or lacks files of its manifest.
    """
    path = Path(where)
    if not path.exists():
        root = store or Path(os.environ.get("TINYLMM_STORE", DEFAULT_STORE))
        named = root / "runs" / path.name
        if path.name != str(where) or not named.is_dir():
            raise UserError(
                f"{where} is neither a folder nor the name of a run in {root}. "
                "Give a model folder, a stage or run folder, or a name that `tinylmm runs` lists."
            )
        path = named
    if (path / RUN_FILE).is_file():
        return _model_of_run(path)
    if (path / OUTPUT_FOLDER / "model").is_dir():
        return _model_of_stage(path)
    if (path / "model" / CONFIG_FILE).is_file() and not (path / CONFIG_FILE).exists():
        path = path / "model"
    _check_kind(path)
    return path


def _model_of_run(folder: Path) -> Path:
    record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    trained = [stage for stage in record["stages"] if stage["kind"] == "train"]
    finished = [folder.parent.parent / "stages" / stage["key"] for stage in trained]
    finished = [stage for stage in finished if stage.is_dir()]
    if not finished:
        raise UserError(
            f"the run {folder.name} ({record['status']}) has no finished training in the store. Run it again."
        )
    return _model_of_stage(finished[-1])


def _model_of_stage(folder: Path) -> Path:
    # A bare copy of a stage's files without its manifest is a plain folder; one in the store has to be whole.
    if (folder / MARKER_FILE).exists() or folder.parent.name == "stages":
        problems = check_folder(folder, deep=False)
        if problems:
            raise IntegrityError("\n".join([f"the stage {folder.name} cannot be used:", *problems]))
    _check_kind(folder / OUTPUT_FOLDER / "model")
    return folder / OUTPUT_FOLDER / "model"


def _check_kind(folder: Path) -> None:
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{folder} holds no model: there is no {CONFIG_FILE} that can be read.") from None
    if kind != "tinylmm":
        raise UserError(
            f"{folder} is no tinylmm model (its model_type is '{kind}'). "
            f"Import it first: tinylmm import {folder} NEW_FOLDER"
        )
