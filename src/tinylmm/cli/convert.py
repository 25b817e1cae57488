"""`tinylmm import` and `tinylmm export`: read and write other tools' checkpoints."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

NAMES_SHOWN = 5


class Layout(StrEnum):
    """What can be imported; `convert/importer.py` has a reader for each."""

    AUTO = "auto"
    FACTORY_FOLDERS = "factory-folders"
    FACTORY = "factory"
    FACTORY_LORA = "factory-lora"
    BENCH = "bench"
    LLAVA = "llava"
    LLAVA_PROJECTOR = "llava-projector"
    LLAVA_LORA = "llava-lora"
    TRANSFORMERS = "transformers"


class Format(StrEnum):
    """What can be written."""

    HF = "hf"
    FACTORY = "factory"
    FACTORY_FOLDERS = "factory-folders"


class Dtype(StrEnum):
    """Of written weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint's folder; nothing is downloaded.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new model folder; must not exist.")],
    layout: Annotated[Layout, typer.Option(help="The checkpoint's layout.")] = Layout.AUTO,
    llm: Annotated[
        Path | None, typer.Option(help="Local folder of the base LLM (and its tokenizer), if the checkpoint lacks it.")
    ] = None,
    tower: Annotated[
        Path | None, typer.Option(help="Local folder of the base vision tower, if the checkpoint lacks it.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template it was trained with; by default the one that fits its end token.")
    ] = None,
) -> None:
    """Turn a TinyLLaVA Factory, TinyLLaVABench, LLaVA or transformers Llava checkpoint into a model of ours.

    No code of the checkpoint is run, and every tensor in it is used exactly once or named.
    """
    _quiet()
    from tinylmm.convert.importer import import_checkpoint

    report = import_checkpoint(source, destination, str(layout), llm, tower, template)
    console = Console(highlight=False)
    sizes = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    _line(console, f"read {source} as {report.layout}; parameters: {sizes}")
    _line(console, f"chat template {report.description['template']}, images {report.description['image']}")
    for reason in sorted(set(report.ignored.values())):
        names = sorted(name for name, why in report.ignored.items() if why == reason)
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        _line(console, f"left out ({reason}): {', '.join(names[:NAMES_SHOWN])}{more}")
    for note in report.notes:
        _line(console, f"note: {note}")
    _line(console, f"wrote {destination}")


def export(
    checkpoint: Annotated[str, typer.Argument(help="A model, stage or run folder, or the name of a run.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new folder; must not exist.")],
    format_: Annotated[Format, typer.Option("--format", help="The layout to write.")] = Format.HF,
    dtype: Annotated[Dtype, typer.Option(help="Of the written weights.")] = Dtype.FP32,
    llm: Annotated[str | None, typer.Option(help="factory: what to load the tokenizer from (a hub id).")] = None,
    tower: Annotated[
        str | None, typer.Option(help="factory: what to load the image processor from (a hub id).")
    ] = None,
    store: Annotated[Path | None, typer.Option(envvar="TINYLMM_STORE", help="Where runs are found by name.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose classes the model may use.")] = None,
) -> None:
    """Write a model for other tools: hf for transformers alone, with equal logits, or a layout of TinyLLaVA Factory's."""
    _quiet()
    from tinylmm.convert.exporter import export_checkpoint

    report = export_checkpoint(checkpoint, destination, str(format_), str(dtype), llm, tower, store, trust or [])
    console = Console(highlight=False)
    for note in report.notes:
        _line(console, f"note: {note}")
    proof = "" if report.difference is None else f"; logits differ from ours by {report.difference:.1e} at most"
    _line(console, f"wrote {destination} ({report.format}, {report.tensors} tensors{proof})")


def _line(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _quiet() -> None:
    """Loading a model is no news; what we found out about it is."""
    # Saving imports DeepSpeed (through accelerate), which looks for a GPU aloud; converting needs none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.WARNING)
