"""Which model is meant: by a model's folder, a stage's, a run's, a run's name, or RUN@STAGE. No torch here.

This is the one rule: chat, export, evaluation and a recipe's `from_model` all ask `find_model`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tinylmm.errors import IntegrityError, UserError
from tinylmm.store.integrity import check_folder
from tinylmm.store.layout import (
    MARKER_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    STAGES_FOLDER,
    WORK_FOLDER,
    StoreLayout,
    model_folder,
)
from tinylmm.store.runs import RunRecord, read_run

CONFIG_FILE = "config.json"
MODEL_TYPE = "tinylmm"
DEFAULT_STORE = "store"
RUNS_SHOWN = 5
STAGE_SIGN = "@"
"""Stands between the name of a run and that of one of its trainings; no run's name has one."""


class ForeignModelError(UserError):
    """A folder holds another tool's checkpoint, which has to become a model of ours first."""

    def __init__(self, folder: Path, kind: object) -> None:
        super().__init__(
            f"{folder} is no tinylmm model (its model_type is '{kind}'). "
            f"Import it first: tinylmm import {folder} NEW_FOLDER"
        )
        self.folder = folder


def find_model(where: str | Path, store: Path | None = None) -> Path:
    """Return the model folder that `where` stands for.

    A folder that is a model, a stage or a run comes before a run of that name. A run stands for the model that its last
    training made. As long as that is not finished the run stands for none: an earlier training's model answers too, but
    it is not what the run was to make, and nobody would notice. Who means an earlier one says so: RUN@STAGE.

    Args:
        where: a model folder; a train stage's folder, or its `output`; a run's folder; the name of a run; or the name of a run
            and of one of its trainings, joined by `@`.
        store: where runs are looked for by name; default: TINYLMM_STORE, else ./store.

    Raises:
        UserError: it stands for no model.
        ForeignModelError: it is another tool's checkpoint.
        IntegrityError: the stage is unfinished or lacks files of its manifest, or the run's record cannot be read.
    """
    path = Path(where).expanduser()
    layout = StoreLayout(store or Path(os.environ.get("TINYLMM_STORE", DEFAULT_STORE)))
    if (path / RUN_FILE).is_file():
        return _model_of_run(read_run(path), StoreLayout(path.resolve().parent.parent))
    for folder in (path, path / MODEL_FOLDER, model_folder(path)):
        if (folder / CONFIG_FILE).is_file():
            return _checked(folder)
    if (path / MARKER_FILE).exists():  # a stage that has no model, or whose model was deleted
        return _checked(model_folder(path))
    if path.name == str(where) and layout.run(path.name).is_dir():
        return _model_of_run(read_run(layout.run(path.name)), layout)
    if path.exists():
        raise UserError(f"{where} holds no model: there is no {CONFIG_FILE} that can be read.")
    name, _, stage = str(where).partition(STAGE_SIGN)
    if stage and Path(name).name == name and (layout.run(name) / RUN_FILE).is_file():
        return _model_of_stage(read_run(layout.run(name)), stage, layout)
    raise UserError(
        f"{where} is neither a folder nor the name of a run in {layout.root}. "
        "Give a model folder, a stage or run folder, a run's name, or a run's and a training's as RUN@STAGE. "
        f"{_runs_there(layout)}"
    )


def _model_of_stage(run: RunRecord, name: str, layout: StoreLayout) -> Path:
    """The model that one of a run's trainings made."""
    found = [stage for stage in run.trainings if stage.name == name]
    if not found:
        there = ", ".join(stage.name for stage in run.trainings) or "none"
        raise UserError(f"the run {run.name} has no training '{name}'. Its trainings: {there}.")
    folder = layout.stage(found[-1].key)
    if not folder.is_dir():
        raise UserError(
            f"the run {run.name} ({run.status}) has not finished its training {name}. "
            "Give the run's command again to finish it."
        )
    return _checked(model_folder(folder))


def _model_of_run(run: RunRecord, layout: StoreLayout) -> Path:
    if not run.trainings:
        raise UserError(f"the run {run.name} trains no model.")
    last = layout.stage(run.trainings[-1].key)
    if not last.is_dir():
        raise UserError(_unfinished(run, layout))
    return _checked(model_folder(last))


def _unfinished(run: RunRecord, layout: StoreLayout) -> str:
    earlier = [(stage.name, layout.stage(stage.key)) for stage in run.trainings[:-1]]
    lines = [
        f"the run {run.name} ({run.status}) has not finished its last training, {run.trainings[-1].name}, so there is no "
        "model that it stands for. Give the run's command again to finish it."
    ]
    lines += [f"To use the model that its {name} made, name {folder}" for name, folder in earlier if folder.is_dir()]
    return "\n".join(lines)


def _runs_there(layout: StoreLayout) -> str:
    files = layout.runs.glob(f"*/{RUN_FILE}")
    newest = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:RUNS_SHOWN]
    return f"Runs there: {', '.join(path.parent.name for path in newest) or 'none'}."


def _checked(folder: Path) -> Path:
    """Refuse a model of a stage that is not whole, and what is no model of ours."""
    stage = folder.resolve().parent.parent
    # A bare copy of a stage's files without its manifest is a plain folder; one in the store has to be whole.
    in_stage = folder.resolve() == model_folder(stage)
    has_manifest = (stage / MARKER_FILE).exists() or stage.parent.name in (STAGES_FOLDER, WORK_FOLDER)
    if in_stage and has_manifest and (problems := check_folder(stage, deep=False)):
        raise IntegrityError("\n".join([f"the stage {stage.name} cannot be used:", *problems]))
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{folder} holds no model: there is no {CONFIG_FILE} that can be read.") from None
    if kind != MODEL_TYPE:
        raise ForeignModelError(folder, kind)
    return folder
