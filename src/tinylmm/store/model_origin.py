"""Where a model comes from: its run, the training stage that made it, and that stage's digest. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tinylmm.errors import IntegrityError
from tinylmm.store.find_model import DEFAULT_STORE, find_model
from tinylmm.store.layout import RUN_FILE, SPEC_FILE, StoreLayout, model_folder
from tinylmm.store.runs import RunRecord, StageRow, read_run, read_runs

STAGE_SIGN = "@"
"""Stands between the name of a run and that of one of its trainings."""


@dataclass(frozen=True)
class ModelOrigin:
    """What the store knows of a model.

    Attributes:
        folder: the model's.
        store: root of the store that made it; None of a folder from elsewhere.
        stage: its training, as the run saw it; None where no run knows it.
        run: the run that was named, or the newest one that has the training.
        digest: of the training stage; None of a folder from elsewhere.
    """

    folder: Path
    store: Path | None = None
    stage: StageRow | None = None
    run: RunRecord | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """What to call the model: its run, its training's folder, or its own folder."""
        folder = self.folder.resolve()
        own = folder.name if self.digest is None else folder.parent.parent.name
        return own if self.run is None else self.run.name

    def as_record(self) -> dict[str, str | None]:
        """Run, stage and digest, for whoever wants to find it again."""
        return {
            "run": None if self.run is None else self.run.name,
            "stage": None if self.stage is None else self.stage.name,
            "digest": self.digest,
        }


def origin_of(where: str | Path, store: Path | None = None) -> ModelOrigin:
    """Return where the model that `find_model` finds comes from.

    Raises:
        UserError, IntegrityError: as `find_model`.
    """
    folder = find_model(where, store)
    stage_folder = folder.resolve().parent.parent
    if folder.resolve() != model_folder(stage_folder) or not (stage_folder / SPEC_FILE).is_file():
        return ModelOrigin(folder)
    root, digest = stage_folder.parent.parent, _digest(stage_folder)
    layout = StoreLayout(store or Path(os.environ.get("TINYLMM_STORE", DEFAULT_STORE)))
    places = (Path(where).expanduser(), layout.run(str(where).partition(STAGE_SIGN)[0]))
    named = [path for path in places if (path / RUN_FILE).is_file()]
    runs = [read_run(named[0])] if named else read_runs(root)
    for run in runs:
        for stage in run.trainings:
            if stage.key == stage_folder.name:
                return ModelOrigin(folder, root, stage, run, digest)
    return ModelOrigin(folder, root, digest=digest)


def _digest(stage_folder: Path) -> str | None:
    """The stage's whole digest; its folder's name has the first digits alone."""
    path = stage_folder / SPEC_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["digest"]) if "digest" in content else None
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
