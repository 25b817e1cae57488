"""`tinylmm import`: a checkpoint of another tool becomes one of our model folders."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylmm.convert import factory_reader as factory
from tinylmm.convert import hf_reader as native
from tinylmm.convert import llava
from tinylmm.convert.parts import Parts, assemble
from tinylmm.convert.source import Source, layout_of, open_source
from tinylmm.errors import UserError, suggestion
from tinylmm.models.checkpoint import save_model

READERS: dict[str, Callable[[Source], Parts]] = {
    "factory-folders": factory.read_folders,
    "factory": factory.read_merged,
    "factory-lora": factory.read_lora,
    "bench": llava.read_full,
    "llava": llava.read_full,
    "llava-projector": llava.read_projector,
    "llava-lora": llava.read_lora,
    "transformers": native.read_transformers,
}
"""`--layout` -> its reader."""


@dataclass(frozen=True)
class ImportReport:
    """What was done.

    Attributes:
        layout: the layout that was read.
        parameters: part -> number of parameters.
        ignored: tensors left out on purpose -> why.
        notes: what was assumed, filled in, or taken from elsewhere.
        description: the new model's config.json.
    """

    layout: str
    parameters: dict[str, int]
    ignored: dict[str, str]
    notes: list[str]
    description: dict[str, Any]


def import_checkpoint(
    folder: Path,
    destination: Path,
    layout: str = "auto",
    llm: Path | None = None,
    tower: Path | None = None,
    template: str | None = None,
) -> ImportReport:
    """Read a foreign checkpoint and write it as a model folder of ours, whole or not at all.

    Args:
        folder: the checkpoint; nothing is downloaded and no code in it is run.
        destination: a folder that does not exist yet.
        layout: a key of READERS, or "auto".
        llm, tower: local folders of base parts, for layouts that hold only what was trained.
        template: chat template; None derives it from the tokenizer's end token.

    Raises:
        UserError, DataError: the layout is unknown, a file is missing or refused, or tensors do not fit one to one.
    """
    check_destination(destination)
    source = open_source(folder, llm, tower, template)
    if layout == "auto":
        layout = layout_of(source)
    if layout not in READERS:
        raise UserError(
            f"--layout: unknown layout '{layout}'. {suggestion(layout, READERS)} Allowed: auto, {', '.join(READERS)}."
        )
    loaded = assemble(READERS[layout](source), source)
    draft = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_model(loaded, draft, None, {})
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sizes = {
        name: sum(p.numel() for p in getattr(loaded.model, name).parameters())
        for name in ("vision_tower", "connector", "llm")
    }
    return ImportReport(layout, sizes, source.ignored, source.notes, loaded.description)


def check_destination(destination: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: `destination` exists.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already. Name a folder that does not, or delete it first.")
