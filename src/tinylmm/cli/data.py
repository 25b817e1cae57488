"""`tinylmm data check|show`: look at a run's data before it is trained on, as text and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tinylmm.cli.terminal import echo, echo_json, terminal
from tinylmm.errors import EXIT_USER, ConfigError, DiskError, Fault, UserError, suggestion
from tinylmm.store.disk import writing
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import StoreLayout

if TYPE_CHECKING:
    from tinylmm.config.spec import RunSpec
    from tinylmm.data.check import SourceCheck

app = typer.Typer(help="Look at a run's data before it is trained on.", no_args_is_help=True)

Overrides = Annotated[list[str] | None, typer.Argument(help="The same words as for tinylmm-train.")]


@app.command("check")
def check(
    overrides: Overrides = None,
    source: Annotated[list[str] | None, typer.Option(help="Only this source; may be given several times.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Count tokens too, with the run's own tokenizer.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Of images, read the headers only.")] = False,
    html: Annotated[Path | None, typer.Option(help="The page; default: STORE/reports/data-NAME.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Read every record and image that a run would train on; exit code 2 if any cannot be used."""
    run = _training(overrides or [])
    # imported here, as torch and Pillow would slow down every other command's start
    from tinylmm.reports.data_pages import render_check_page
    from tinylmm.reports.data_preview import RunData
    from tinylmm.reports.data_text import render_check

    data = RunData(run)
    console = terminal()
    checks: list[SourceCheck] = []
    for files in data.files(source or []):
        stage = data.stage_of(files.name)
        counted: dict[str, Any] = {}
        if tokens:
            limits = {key: getattr(run.recipe.stages[stage], key) for key in ("max_length", "max_dropped")}
            counted = {"render": data.renderer(stage)[1], "image_tokens": data.image_tokens(stage), **limits}
        checks.append(_checked(files, quick, counted, terminal(stderr=True)))
    page: Path | None = None
    try:
        page = html or StoreLayout(run.store).reports / f"data-{run.data.name}.html"
        _write_page(page, render_check_page(run.data.name, checks))
    except DiskError as error:
        if html is not None:
            raise
        page = None
        echo(f"no page: {error}", err=True)  # who asked for none still learns what there is to know
    if as_json:
        record = {"format": 1, "page": page and str(page), "sources": list(map(_record, checks))}
        echo_json(record)
    else:
        for found in checks:
            console.print(render_check(found), soft_wrap=True)  # whole lines, so they can be searched
            console.print()
        if page is not None:
            console.print(f"page  {page}", highlight=False, soft_wrap=True)
    if not all(found.clean for found in checks):
        raise typer.Exit(EXIT_USER)


@app.command("show")
def show(
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(min=0, help="Which record of the file, from 0.")] = None,
    sample_id: Annotated[str | None, typer.Option("--id", help="The record with this id.")] = None,
    source: Annotated[str | None, typer.Option(help="Source; default: the first that the stage trains on.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage; default: the last one that trains on the source.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write this page.")] = None,
) -> None:
    """Show one sample as the model will see it: tokens, what of them is trained on, images after preprocessing."""
    if index is not None and sample_id is not None:
        raise UserError("--index and --id: give one of them; both name a record.")
    run = _training(overrides or [])
    stages = run.recipe.stages
    if stage is not None and stage not in stages:
        what = f"is '{stage}', which recipe={run.recipe.name} does not have."
        raise ConfigError([Fault("--stage", what, f"{suggestion(stage, stages)} Stages: {', '.join(stages)}.".strip())])
    from tinylmm.reports.data_pages import render_sample_page
    from tinylmm.reports.data_preview import RunData
    from tinylmm.reports.data_text import render_sample

    data = RunData(run)
    named = source or next(iter(stages[stage or list(stages)[-1]].mixture))
    (files,) = data.files([named])
    position = 0 if index is None and sample_id is None else index
    seen = data.see(files, stage or data.stage_of(named), position, sample_id)
    console = terminal()
    console.print(render_sample(seen, colour=console.color_system is not None))
    if html is not None:
        _write_page(html, render_sample_page(seen))
        console.print(f"page  {html}", highlight=False, soft_wrap=True)


def _training(overrides: list[str]) -> RunSpec:
    """The run that these words ask for.

    Raises:
        ConfigError: it trains on no data, or any fault of the words.
    """
    from tinylmm.config.compose import compose_run

    run = compose_run(overrides)
    if not run.recipe.stages:
        what = f"is {run.recipe.name}, which trains nothing, so there is no data to look at."
        raise ConfigError([Fault("recipe", what, "Choose the recipe that you mean to train with.")])
    return run


def _write_page(page: Path, text: str) -> None:
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, text)


def _checked(files: Any, quick: bool, counted: dict[str, Any], console: Console) -> SourceCheck:
    from tinylmm.data.check import check_source

    with console.status(Text(f"{files.name}: reading")) as status:
        return check_source(
            files,
            quick=quick,
            progress=lambda number: status.update(Text(f"{files.name}: {number:,} records read")),
            **counted,
        )


def _record(check: SourceCheck) -> dict[str, Any]:
    from tinylmm.reports.data_text import histograms

    return {
        "name": check.files.name,
        "annotations": str(check.files.annotations),
        "clean": check.clean,
        "problem": check.problem,
        "records": check.records,
        "samples": check.samples,
        "too_long": check.too_long,
        "faults": [{"index": bad.index, "id": bad.sample_id, "reason": bad.reason} for bad in check.faults],
        "histograms": {title: dict(bins) for title, bins in histograms(check)},
        "same_conversations": check.same_conversations,
        "same_images": check.same_images,
        "same_ids": check.same_ids,
    }
