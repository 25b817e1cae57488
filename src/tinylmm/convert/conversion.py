"""A checkpoint of another tool becomes one of our model folders, and one of our models a checkpoint of another tool."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from tinylmm.config.description import ModelDescription
from tinylmm.config.fields import PARTS
from tinylmm.convert.asking import Program, Questions
from tinylmm.convert.certificate import Certificate, OtherAnswersError
from tinylmm.convert.certify import certify, content_of
from tinylmm.convert.format import Export, Format, all_formats, detect_layout
from tinylmm.convert.model_card import About, Exported, write_card
from tinylmm.convert.parts import assemble
from tinylmm.convert.questions import completed, drawn_questions
from tinylmm.convert.source import open_source
from tinylmm.errors import UserError, suggestion
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model
from tinylmm.models.devices import DTYPES
from tinylmm.models.lmm import LMM
from tinylmm.store.find_model import find_model
from tinylmm.store.integrity import follow_umask

_SHORT = {"f32": "fp32", "f16": "fp16"}
"""llama.cpp's words for number types -> ours."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

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
    description: ModelDescription


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        format: its name.
        tensors: how many were written.
        difference: largest absolute difference of logits between our model and the folder as the other tool loads it; None
            where nothing here can load it.
        notes: what the user should know.
        certificate: what asking the other program has found; None where it was not asked for.
    """

    format: str
    tensors: int
    difference: float | None
    notes: list[str]
    certificate: Certificate | None = None


@dataclass(frozen=True)
class Check:
    """How a folder is compared with the model it is made of.

    Attributes:
        count: of questions.
        questions: makes them in a folder that is given to it; None draws pictures.
        tolerance: the user's own, in nats; None takes the program's.
    """

    count: int = 32
    questions: Callable[[Path, int], Questions | None] = lambda folder, count: None
    tolerance: float | None = None


def import_model(
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
        layout: a format's reader, or "auto".
        llm, tower: local folders of base parts, for layouts that hold only what was trained.
        template: chat template; None derives it from the tokenizer's end token.

    Raises:
        UserError, DataError: the layout is unknown, a file is missing or refused, or tensors do not fit one to one.
    """
    _refuse_existing(destination)
    source = open_source(folder, llm, tower, template)
    if layout == "auto":
        layout = detect_layout(source)
    readers = {name: read for known in all_formats() for name, read in known.readers.items()}
    if layout not in readers:
        hint = suggestion(layout, readers)
        raise UserError(f"--layout: unknown layout '{layout}'. {hint} Allowed: auto, {', '.join(readers)}.")
    loaded = assemble(readers[layout](source), source)
    with _draft_of(destination) as draft:
        save_model(loaded, draft, None, {})
    sizes = {part: sum(p.numel() for p in getattr(loaded.model, part).parameters()) for part in PARTS}
    return ImportReport(layout, sizes, source.ignored, source.notes, loaded.description)


def export_model(
    where: str | Path,
    destination: Path,
    format_: str = "hf",
    dtype: str = "fp32",
    llm: str | None = None,
    tower: str | None = None,
    store: Path | None = None,
    trust: Sequence[str] = (),
    about: About | None = None,
    check: Check | None = None,
) -> ExportReport:
    """Load one of our models and write it for another tool, whole or not at all.

    Args:
        where: a model, stage or run folder, or the name of a run.
        destination: a folder that does not exist yet.
        format_: a format's writer.
        dtype: of the written weights: fp32, bf16 or fp16 (also f32 and f16), or a quantisation that the format has.
        llm, tower: what a tool that loads tokenizer and image processor by name (TinyLLaVA Factory) loads them from.
        store: where runs are found by name.
        trust: packages besides tinylmm and transformers whose classes the model may be made of.
        about: what the model card says of where it comes from.
        check: ask the program that the format is for, and compare its answers with ours; None does not.

    Raises:
        UserError: there is no such model, format or dtype, the format cannot hold this model, or the program that is to be
            asked is not installed.
        IntegrityError: the model is damaged, or the written folder gives other logits.
        OtherAnswersError: the program that was asked answers otherwise.
    """
    writers = {name: known for known in all_formats() for name in known.writers}
    if format_ not in writers:
        raise UserError(
            f"--to: unknown format '{format_}'. {suggestion(format_, writers)} Allowed: {', '.join(writers)}."
        )
    allowed = (*DTYPES, *_SHORT, *writers[format_].quantizations)
    if dtype not in allowed:
        raise UserError(f"--dtype: {dtype} is not written by --to {format_}. Allowed: {', '.join(allowed)}.")
    quantization = dtype if dtype in writers[format_].quantizations else None
    plain = DTYPES[_SHORT.get(dtype, dtype) if quantization is None else "fp32"]
    if check is not None:
        _program_of(writers[format_], format_).require()
    _refuse_existing(destination)
    loaded = load_model(find_model(where, store), list(trust), merge=not writers[format_].keeps_adapters)
    return write_model(loaded, destination, format_, plain, llm, tower, quantization, about, check)


def write_model(
    loaded: LoadedModel,
    destination: Path,
    format_: str,
    dtype: torch.dtype,
    llm: str | None = None,
    tower: str | None = None,
    quantization: str | None = None,
    about: About | None = None,
    check: Check | None = None,
) -> ExportReport:
    """Write a model that is loaded, in fp32 on the CPU; its weights are rounded to `dtype` in place. See `export_model`."""
    chosen = next(known for known in all_formats() if format_ in known.writers)
    _round_weights(loaded.model, dtype)
    loaded.model.eval()
    export = Export(loaded, dtype, llm, tower, quantization=quantization)
    if reasons := chosen.obstacles(export):
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise UserError(f"this model cannot be {chosen.holds}:\n{listed}\nNothing was written.")
    about = about or About(destination.name)
    word = quantization or next(name for name, known in DTYPES.items() if known == dtype)
    with _draft_of(destination) as draft:
        written = chosen.writers[format_](export, draft)
        certificate = None if check is None else _certified(chosen, export, format_, draft, word, about, check)
        if outlet := chosen.outlets.get(format_):
            exported = Exported(destination.name, format_, word, outlet, export.notes, certificate)
            write_card(draft, about, loaded, exported)
        if certificate is not None and not certificate.passed:
            raise OtherAnswersError(certificate, _set_aside(draft, destination))
    return ExportReport(format_, written.tensors, written.difference, export.notes, certificate)


def _program_of(chosen: Format, format_: str) -> Program:
    if format_ not in chosen.programs:
        raise UserError(
            f"--verify: the format {format_} names no program that could be asked (`programs` of its module). "
            "Export without --verify. Nothing was written."
        )
    return chosen.programs[format_]


def _certified(
    chosen: Format, export: Export, format_: str, folder: Path, dtype: str, about: About, check: Check
) -> Certificate:
    program = _program_of(chosen, format_)
    with tempfile.TemporaryDirectory() as place:
        pictures = Path(place)
        questions = check.questions(pictures, check.count) or drawn_questions(export.loaded, pictures, check.count)
        questions = completed(questions, export.loaded, pictures, program.squared)
        model = dict(about.model)
        if not model.get("digest") and export.loaded.folder is not None:
            model["content"] = content_of(export.loaded.folder)
        certificate = certify(program, format_, folder, export.loaded, dtype, questions, model, check.tolerance)
    certificate.write(folder)
    return certificate


def _set_aside(draft: Path, destination: Path) -> Path:
    """Keep what was written where nobody takes it for the export: `DEST.failed`, with a number if there is such a folder."""
    names = (f"{destination.name}.failed{f'-{number}' if number > 1 else ''}" for number in count(1))
    kept = next(path for path in map(destination.with_name, names) if not path.exists())
    follow_umask(draft)
    draft.rename(kept)
    return kept


@contextmanager
def _draft_of(destination: Path) -> Iterator[Path]:
    """Yield a folder beside `destination` that takes its name when the block ends well, and goes when it does not."""
    _refuse_existing(destination)
    draft = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        follow_umask(draft)
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise UserError(f"{destination} exists already. Name a folder that does not, or delete it first.")


@torch.no_grad()
def _round_weights(model: LMM, dtype: torch.dtype) -> None:
    """Round what is saved, and that alone: rotary frequencies are computed in fp32 by whoever loads the weights."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
