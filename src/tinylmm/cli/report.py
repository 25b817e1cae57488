"""`tinylmm report`: scores in the terminal, and the report's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    runs: Annotated[list[str] | None, typer.Argument(help="Run names; default: the newest finished run.")] = None,
    store: Annotated[Path, typer.Option(help="The store that has the runs.")] = Path("store"),
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: STORE/reports/RUN.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores and paths as JSON instead of a table.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also write one PNG that sums the run up (for a README).")
    ] = None,
) -> None:
    """Show a run's scores and write report.html, report.md and results.json (several runs: side by side)."""
    # imported here, as matplotlib and Jinja2 would slow down every other command's start
    from tinylmm.reports.collect import collect_report
    from tinylmm.reports.picture import results_picture
    from tinylmm.reports.tables import render_scores, result_rows
    from tinylmm.reports.write import write_files

    collected = collect_report(store, runs)
    paths = write_files(collected, out)
    written = {"html": paths.html, "markdown": paths.markdown, "results": paths.results}
    if picture is not None:
        results_picture(collected, picture)
        written["picture"] = picture
    if as_json:
        record = {
            "format": 1,
            "rows": result_rows(collected),
            "files": {name: str(path) for name, path in written.items()},
        }
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    console = Console()
    console.print(render_scores(collected))
    for name, path in written.items():
        console.print(f"{name:>9}  {path}", markup=False, highlight=False, soft_wrap=True)
