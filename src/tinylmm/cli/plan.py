"""`tinylmm plan`: the stage graph of a run or a sweep with each stage's status; touches neither weights nor torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tinylmm.cli.terminal import echo_json, terminal


def plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="The same words as for tinylmm-train.")] = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Plan a sweep.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which stages a run or a sweep would run, and which it would reuse."""
    from tinylmm.cli.estimate import show_estimate
    from tinylmm.config.compose import compose_all, run_name
    from tinylmm.planning.estimates import estimate_record
    from tinylmm.planning.planner import plan_record, plan_run

    plans = [plan_run(spec, run_name(spec), words) for words, spec in compose_all(overrides or [], multirun)]
    record = plan_record(plans) | {"estimate": estimate_record(plans)}
    if as_json:
        echo_json(record)
        return
    console = terminal()
    console.print(_table(record))
    totals = record["totals"]
    if totals["runs"] > 1:
        shared = ", ".join(f"{n} of {totals['asked'][kind]} {kind}" for kind, n in totals["distinct"].items())
        console.print(f"{totals['runs']} runs; distinct stages: {shared}", highlight=False)
    show_estimate(console, record["estimate"])
    for sentence in record["warnings"]:
        console.print(f"warning: {sentence}", highlight=False)
    for sentence in record["unknown"]:
        console.print(f"unknown: {sentence}", highlight=False)
    for kind, items in (("missing", record["missing"]), ("not found, so left out", record["not_found"])):
        for item in items:
            console.print(
                f"{kind}: {item['what']}\n  looked at:  {item['looked_at']}\n  how to get: {item['how_to_get']}",
                highlight=False,
            )


def _table(record: dict[str, Any]) -> Table:
    todo = sum(stage["status"] == "todo" for stage in record["stages"])
    table = Table(
        "kind",
        "name",
        "digest",
        "needs",
        "status",
        title=f"{len(record['stages'])} stages, {todo} to do",
        title_justify="left",
    )
    for stage in record["stages"]:
        colour = "green" if stage["status"] == "complete" else "yellow"
        parents = " ".join(parent[:8] for parent in stage["parents"])
        table.add_row(
            stage["kind"],
            stage["name"],
            stage["digest"][:12],
            parents,
            Text(stage["status"], colour),
        )
    return table
