"""`tinylmm plan`: the stage graph of a run or a sweep with each stage's status; touches neither weights nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tinylmm.cli.terminal import echo_json, terminal
from tinylmm.errors import TinyLMMError

if TYPE_CHECKING:
    from tinylmm.planning.planner import RunPlan

COUNTS = ("asked", "distinct", "complete", "todo", "waits")


def plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="The same words as for tinylmm-train.")] = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Plan a sweep.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    graph: Annotated[Path | None, typer.Option(help="Also draw the stages and what they need: FILE.svg.")] = None,
) -> None:
    """Show which stages a run or a sweep would run, and which it would reuse."""
    from tinylmm.cli.estimate import show_estimate
    from tinylmm.config.compose import compose_all
    from tinylmm.planning.estimates import estimate_record
    from tinylmm.planning.planner import plan_record, plan_runs

    if graph is not None:
        from tinylmm.reports.graph_picture import check_format, draw_graph

        check_format(graph)
    plans = [_planned(plan) for _, plan in plan_runs(compose_all(overrides or [], multirun))]
    record = plan_record(plans) | {"estimate": estimate_record(plans)}
    if graph is not None:
        draw_graph(record, graph)
    if as_json:
        echo_json(record)
        return
    console = terminal()
    console.print(_table(record))
    if record["totals"]["runs"] > 1:
        console.print(_totals(record["totals"]))
    show_estimate(console, record["estimate"])
    if graph is not None:
        console.print(f"graph    {graph}", highlight=False, soft_wrap=True)
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


def _planned(plan: RunPlan | TinyLMMError) -> RunPlan:
    if isinstance(plan, TinyLMMError):
        raise plan
    return plan


def _totals(totals: dict[str, Any]) -> Table:
    """Of a sweep: what its runs ask for, by kind, and what of that is one and the same."""
    title = f"{totals['runs']} runs"
    table = Table("kind", *COUNTS, title=title, title_justify="left")
    for kind in totals["asked"]:
        table.add_row(kind, *(str(totals[count].get(kind, 0)) for count in COUNTS))
    table.add_row("all", *(str(sum(totals[count].values())) for count in COUNTS), style="bold")
    return table


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
