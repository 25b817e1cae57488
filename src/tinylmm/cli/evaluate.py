"""`tinylmm eval`: benchmarks on a finished or imported model, without a training run around it."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A model, stage or run folder, or the name of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Words as for tinylmm-train: eval=[gqa,pope], eval.gqa.limit=100, ...")
    ] = None,
) -> None:
    """Ask benchmarks of a finished or imported model; what the store has of it is reused. Without eval=, those that are there.

    The same as `tinylmm-train recipe=evaluate recipe.from_model=MODEL ...`, so `tinylmm plan` takes these words too.
    """
    from tinylmm.cli.train import run
    from tinylmm.config.overrides import quoted

    if code := run(["recipe=evaluate", f"recipe.from_model={quoted(checkpoint)}", *(overrides or [])]):
        raise typer.Exit(code)
