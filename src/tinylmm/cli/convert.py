"""`tinylmm import` and `tinylmm export`: read and write other tools' checkpoints."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tinylmm.cli.terminal import terminal
from tinylmm.convert.format import find_names
from tinylmm.store.model_origin import ModelOrigin, origin_of

if TYPE_CHECKING:
    from tinylmm.convert.asking import Questions
    from tinylmm.convert.model_card import About
    from tinylmm.reports.records import RunReport

NAMES_SHOWN = 5
LAYOUTS = ("auto", *find_names("readers"))
"""Shown by --help; whoever reads or writes refuses other names, and says which one was meant."""
FORMATS = tuple(find_names("writers"))
DTYPES = ("fp32", "bf16", "fp16", "q8_0")


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint's folder; nothing is downloaded.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new model folder; must not exist.")],
    layout: Annotated[str, typer.Option(metavar=f"<{'|'.join(LAYOUTS)}>", help="The checkpoint's layout.")] = "auto",
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
    from tinylmm.convert.conversion import import_model
    from tinylmm.convert.tensors import listed

    report = import_model(source, destination, layout, llm, tower, template)
    console = terminal(highlight=False)
    sizes = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    _line(console, f"read {source} as {report.layout}; parameters: {sizes}")
    _line(console, f"chat template {report.description.template}, images {report.description.as_json()['image']}")
    for reason in sorted(set(report.ignored.values())):
        names = sorted(name for name, why in report.ignored.items() if why == reason)
        _line(console, f"left out ({reason}): {listed(names, NAMES_SHOWN)}")
    for note in report.notes:
        _line(console, f"note: {note}")
    _line(console, f"wrote {destination}")


def export(
    checkpoint: Annotated[str, typer.Argument(help="A model, stage or run folder, the name of a run, or RUN@STAGE.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new folder; must not exist.")],
    format_: Annotated[
        str, typer.Option("--to", "--format", metavar=f"<{'|'.join(FORMATS)}>", help="What to write.")
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(metavar=f"<{'|'.join(DTYPES)}>", help="Of the written weights; q8_0 with --to gguf alone.")
    ] = "fp32",
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask the other program the same questions, and keep a certificate.")
    ] = False,
    questions: Annotated[int, typer.Option(min=1, help="--verify: how many, about a picture each.")] = 32,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="--verify: largest difference of log-probabilities, in nats.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", "--licence", help="For the model card: the hub's word (apache-2.0, ...).")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="factory: what to load the tokenizer from (a hub id).")] = None,
    tower: Annotated[
        str | None, typer.Option(help="factory: what to load the image processor from (a hub id).")
    ] = None,
    store: Annotated[Path | None, typer.Option(envvar="TINYLMM_STORE", help="Where runs are found by name.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose classes the model may use.")] = None,
) -> None:
    """Write a model for other tools: hf for transformers and vLLM, gguf for llama.cpp and Ollama, adapter (a LoRA stage) for
    peft, or a layout of the Factory's. --verify asks such a program, and ends with exit code 1 where it answers otherwise."""
    _quiet()
    from tinylmm.convert.conversion import Check, export_model

    origin = origin_of(checkpoint, store)
    run = _run_of(origin)
    about = _about(origin, run, licence)
    check = Check(questions, partial(_own_questions, origin, run), tolerance) if verify else None
    report = export_model(checkpoint, destination, format_, dtype, llm, tower, store, trust or [], about, check)
    console = terminal(highlight=False)
    for note in report.notes:
        _line(console, f"note: {note}")
    proof = "" if report.difference is None else f"; logits differ from ours by {report.difference:.1e} at most"
    if report.certificate is not None:
        _line(console, f"verified: {report.certificate.sentence}")
    _line(console, f"wrote {destination} ({report.format}, {report.tensors} tensors{proof})")


def _run_of(origin: ModelOrigin) -> RunReport | None:
    from tinylmm.reports.collect import collect_report

    if origin.run is None or origin.store is None:
        return None
    return collect_report(origin.store, [origin.run.name]).runs[0]


def _about(origin: ModelOrigin, run: RunReport | None, licence: str | None) -> About:
    """What the model card says of where the model comes from."""
    from tinylmm.convert.model_card import About
    from tinylmm.reports.card import base_models, card_sections, datasets, hub_results

    if run is None or origin.stage is None:
        return About(origin.name, origin.as_record(), licence=licence)
    stage, spec = origin.stage.name, run.record.spec
    sections, results = card_sections(run, stage), hub_results(run, stage)
    return About(origin.name, origin.as_record(), base_models(spec), datasets(spec), licence, sections, results)


def _own_questions(origin: ModelOrigin, run: RunReport | None, folder: Path, count: int) -> Questions | None:
    """Questions of the run's own evaluations; None where it has none, or their pictures are gone."""
    from tinylmm.convert.asking import Question, Questions
    from tinylmm.reports.card import own_questions

    if run is None or origin.stage is None or origin.store is None:
        return None
    source, found = own_questions(origin.store, run, origin.stage.name, folder, count)
    return Questions(source, tuple(Question(text, tuple(images)) for text, images in found)) if found else None


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _quiet() -> None:
    """Loading a model is no news; what we found out about it is."""
    # Saving imports DeepSpeed (through accelerate), which looks for a GPU aloud; converting needs none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.WARNING)
