"""What an exporter hands back, and writing a folder whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinylmm.convert.importer import check_destination


@dataclass(frozen=True)
class ExportReport:
    """What was done.

    Attributes:
        format: hf, factory or factory-folders.
        tensors: how many were written.
        difference: largest absolute difference of logits between our model and the folder as transformers loads it; None
            where nothing here can load it.
        notes: what the user should know.
    """

    format: str
    tensors: int
    difference: float | None
    notes: list[str]


@contextmanager
def draft_of(destination: Path) -> Iterator[Path]:
    """Yield a folder beside `destination` that takes its name when the block ends well, and goes when it does not.

    Raises:
        UserError: `destination` exists.
    """
    check_destination(destination)
    draft = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
