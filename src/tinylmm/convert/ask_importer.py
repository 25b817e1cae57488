"""Reads an exported folder with our own importer and asks what came in: for formats whose program cannot be run here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tinylmm.convert.ask_ours import ask_ours
from tinylmm.convert.asking import Asking, Heard, Tolerance
from tinylmm.convert.parts import Parts, assemble
from tinylmm.convert.source import Source, open_source
from tinylmm.errors import IntegrityError, UserError
from tinylmm.models.checkpoint import load_model, save_model

SAME = Tolerance(
    1e-4, "the same program computes with the same weights, so nothing but their way there and back differs"
)


def importer_tolerance(dtype: str) -> Tolerance:
    """What counts as rounding, in any dtype."""
    return SAME


def ask_importer(asking: Asking, read: Callable[[Source], Parts]) -> Heard:
    """Import the folder, as `tinylmm import --template` does, and ask the model that came of it."""
    try:
        source = open_source(asking.folder, None, None, asking.loaded.model.template)
        with tempfile.TemporaryDirectory() as place:
            save_model(assemble(read(source), source), Path(place) / "model", None, {})
            again = load_model(Path(place) / "model", [])
    except UserError as error:
        raise IntegrityError(f"tinylmm's importer refuses the folder: {error}") from error
    return Heard(ask_ours(again, asking.questions, asking.tokens, asking.expected), {})
