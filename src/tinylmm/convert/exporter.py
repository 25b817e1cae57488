"""`tinylmm export`: one of our models in the layout of another tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinylmm.convert.factory_writer import export_factory
from tinylmm.convert.hf_writer import export_hf
from tinylmm.convert.report import ExportReport
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import load_model
from tinylmm.models.devices import DTYPES
from tinylmm.store.find_model import find_model

FORMATS = ("hf", "factory", "factory-folders")


def export_checkpoint(
    where: str | Path,
    destination: Path,
    format_: str = "hf",
    dtype: str = "fp32",
    llm: str | None = None,
    tower: str | None = None,
    store: Path | None = None,
    trust: Sequence[str] = (),
) -> ExportReport:
    """Write a model for other tools, whole or not at all.

    Args:
        where: a model, stage or run folder, or the name of a run.
        destination: a folder that does not exist yet.
        format_: one of FORMATS.
        dtype: of the written weights: fp32, bf16 or fp16.
        llm, tower: factory formats only: what the Factory loads tokenizer and image processor from.
        store: where runs are found by name.
        trust: packages besides tinylmm and transformers whose classes the model may be made of.

    Raises:
        UserError: there is no such model, format or dtype, or the format cannot hold this model.
        IntegrityError: the model is damaged, or the written folder gives other logits.
    """
    if format_ not in FORMATS or dtype not in DTYPES:
        raise UserError(f"format {format_}, dtype {dtype}; allowed: {', '.join(FORMATS)}, and {', '.join(DTYPES)}.")
    loaded = load_model(find_model(where, store), list(trust))
    if format_ == "hf":
        return export_hf(loaded, destination, DTYPES[dtype])
    return export_factory(loaded, destination, DTYPES[dtype], format_ == "factory-folders", llm, tower)
