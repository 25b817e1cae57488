"""`tinylmm report`: scores in the terminal, and the report's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinylmm.cli.store import StoreOption
from tinylmm.cli.terminal import echo, echo_json, terminal

if TYPE_CHECKING:
    from tinylmm.reports.records import Report

OVERLAPS_SHOWN = 10


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run names, or the words of a sweep as tinylmm-train takes them (experiment=nano_paper, seed=0,1); "
            "default: the newest finished run."
        ),
    ] = None,
    store: StoreOption = Path("store"),
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: STORE/reports/RUN.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores and paths as JSON instead of a table.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also write one PNG that sums the run up (for a README).")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare two runs question by question: tinylmm report --compare A B.")
    ] = False,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Look for images that a run was both trained on and asked about.")
    ] = False,
) -> None:
    """Show a run's scores and write report.html, report.md and results.json.

    Several runs, or a sweep: by what varies between them, with intervals over seeds and questions, and table.tex and table.csv.
    """
    # imported here, as matplotlib and Jinja2 would slow down every other command's start
    from tinylmm.reports.collect import collect_report
    from tinylmm.reports.effects import findings_of
    from tinylmm.reports.picture import results_picture
    from tinylmm.reports.tables import render_scores, result_rows
    from tinylmm.reports.write import write_files

    names = _named(store, runs) if runs and any("=" in word for word in runs) else runs
    collected = collect_report(store, names)
    if compare or overlap:
        _compare(collected, out, as_json) if compare else _overlap(collected, as_json)
        return
    findings = findings_of(collected)
    written = dict(write_files(collected, out, findings).items())
    if picture is not None:
        results_picture(collected, picture)
        written["picture"] = picture
    if as_json:
        record = {
            "format": 1,
            "rows": result_rows(collected),
            "files": {name: str(path) for name, path in written.items()},
        }
        echo_json(record)
        return
    console = terminal()
    console.print(render_scores(collected, findings))
    for name, path in written.items():
        console.print(f"{name:>9}  {path}", highlight=False, soft_wrap=True)


def _named(store: Path, words: list[str]) -> list[str]:
    """Names of the runs of a sweep: of each that these words ask for the newest."""
    from tinylmm.config.compose import compose_all
    from tinylmm.reports.sweep import runs_of_sweep

    specs = [spec.model_dump(mode="json") for _, spec in compose_all(words, multirun=True)]
    found = runs_of_sweep(store, specs)
    if len(found) < len(specs):
        left_out = f"{len(specs) - len(found)} of {len(specs)} runs"
        echo(f"{left_out} that these words ask for have not ended, and are left out.", err=True)
    return found


def _compare(collected: Report, out: Path | None, as_json: bool) -> None:
    from tinylmm.reports.compare import compare_runs, comparison_json, render_comparison
    from tinylmm.reports.write import write_comparison

    pairs = compare_runs(collected)
    page, record = write_comparison(collected, pairs, out)
    if as_json:
        echo_json(comparison_json(collected, pairs))
        return
    console = terminal()
    console.print(render_comparison(collected, pairs))
    console.print(f"     html  {page}\n     json  {record}", highlight=False, soft_wrap=True)


def _overlap(collected: Report, as_json: bool) -> None:
    from tinylmm.reports.overlap import find_overlaps

    found = [overlap for run in collected.runs for overlap in find_overlaps(collected.store, run)]
    if as_json:
        echo_json([overlap.as_json() for overlap in found])
        return
    for overlap in found:
        what = f"{overlap.benchmark}: {len(overlap.pairs):,} of {overlap.asked:,} images were trained on"
        echo(f"{overlap.run}  {what} ({overlap.trained:,} training images)")
        for asked, trained in overlap.pairs[:OVERLAPS_SHOWN]:
            echo(f"    {asked} is {trained}")
