"""`tinylmm eval`: benchmarks on a finished, imported or exported model, without a training run around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tinylmm.cli.terminal import echo


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A model, stage or run folder, the name of a run, or another tool's checkpoint folder."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Words as for tinylmm-train: eval=[gqa,pope], eval.gqa.limit=100, ...")
    ] = None,
) -> None:
    """Ask benchmarks of a model that is there; what the store has of it is reused. Without eval=, those that are there.

    The same as `tinylmm-train recipe=evaluate recipe.from_model=MODEL ...`, so `tinylmm plan` takes these words too.
    Another tool's checkpoint is imported into the store first, once, if `tinylmm import` reads it without further options.
    """
    from tinylmm.cli.train import run
    from tinylmm.config.overrides import quoted

    words = overrides or []
    model = _ours(checkpoint, _store(words))
    if code := run(["recipe=evaluate", f"recipe.from_model={quoted(model)}", *words]):
        raise typer.Exit(code)


def _store(words: list[str]) -> Path:
    """The store that a run of these words has (conf/train.yaml)."""
    from tinylmm.store.find_model import DEFAULT_STORE

    named = [word.removeprefix("store=") for word in words if word.startswith("store=")]
    return Path(named[-1] if named else os.environ.get("TINYLMM_STORE", DEFAULT_STORE)).expanduser()


def _ours(checkpoint: str, store: Path) -> str:
    """What is meant, as a model of ours: itself, or what was made of another tool's checkpoint with the same content."""
    from tinylmm.errors import UserError
    from tinylmm.store.find_model import ForeignModelError, find_model

    try:
        find_model(checkpoint, store)
    except ForeignModelError as error:
        return str(_imported(error.folder, store))
    except UserError:
        pass  # the run says it, with all other faults
    return checkpoint


def _imported(folder: Path, store: Path) -> Path:
    from filelock import FileLock

    from tinylmm.planning.fingerprints import checkpoint_fingerprint
    from tinylmm.store.find_model import CONFIG_FILE
    from tinylmm.store.layout import KEY_DIGITS, StoreLayout
    from tinylmm.store.stage import digest
    from tinylmm.version import __version__

    layout = StoreLayout(store)
    layout.imported.mkdir(parents=True, exist_ok=True)
    content = checkpoint_fingerprint(str(folder.absolute()), layout.fingerprints)
    model = layout.imported / digest({"version": __version__, **content})[:KEY_DIGITS]
    with FileLock(model.with_suffix(".lock"), mode=0o666):
        if not model.is_dir():
            _import(folder, model)
    (model / CONFIG_FILE).touch()  # collecting garbage keeps what was used of late
    return model


def _import(folder: Path, model: Path) -> None:
    from tinylmm.convert.conversion import import_model

    report = import_model(folder, model)
    echo(f"read {folder} as {report.layout}; kept as {model}")
    for note in report.notes:
        echo(f"note: {note}")
