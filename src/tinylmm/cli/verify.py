"""`tinylmm verify`: does every fast path of this run train what a plain training would?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tinylmm.cli.terminal import echo_json, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from tinylmm.store.certificates import Certificate, PathResult

COLOURS = {"equal": "green", "differs": "red", "failed": "red", "not run here": "yellow"}


def verify(
    overrides: Annotated[list[str] | None, typer.Argument(help="The same words as for tinylmm-train.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 3,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage of the recipe; any number of times.")] = None,
    path: Annotated[list[str] | None, typer.Option(help="Only this fast path; any number of times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificates as JSON.")] = False,
) -> None:
    """Run a few steps of this very run with each fast path on and off, and hold them against a plain reference.

    Exit code 1 if one of them differs. What is found is kept in the store, and reports of the run carry it.
    """
    from tinylmm.config.compose import compose_run, run_name
    from tinylmm.errors import UserError
    from tinylmm.planning.planner import plan_run, require_files

    words = overrides or []
    run = compose_run(words)
    plan = plan_run(run, run_name(run), words)
    require_files(plan)
    if not run.recipe.stages:
        raise UserError("this run trains nothing, so there is nothing to verify; choose a recipe with stages.")
    from tinylmm.store.certificates import write_certificate
    from tinylmm.verification.verify import Asked, verify

    console = terminal(stderr=as_json, highlight=False)
    made, failed = [], False
    asked = Asked(samples, steps, tuple(stage or ()), tuple(path or ()))
    for certificate in verify(plan, asked, lambda said: console.print(f"  {said}", style="dim")):
        kept = None if asked.paths else write_certificate(run.store, certificate)  # half a certificate is none
        made.append(certificate.as_json())
        failed = failed or not certificate.passed
        if not as_json:
            _show(console, certificate)
            if kept is not None:
                console.print(f"kept     {kept}", soft_wrap=True)
    if as_json:
        echo_json(made)
    if failed:
        raise typer.Exit(1)


def _show(console: Console, certificate: Certificate) -> None:
    title = (
        f"{certificate.stage}: {certificate.steps} steps of {certificate.samples} samples in {certificate.precision} "
        f"on {certificate.device}: largest differences"
    )
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("path", "loss", "gradients", "weights", "of tolerance", ""):
        table.add_column(heading, no_wrap=heading != "path")
    for path in certificate.paths:
        if path.compared:
            table.add_row(*_row(path))
    console.print(table)
    for path in certificate.paths:
        if path.why:
            console.print(Text.assemble(f"{path.name}: ", (path.status, COLOURS[path.status]), f": {path.why}"))
    console.print(f"tolerance: {certificate.tolerance}")
    for remark in certificate.remarks:
        console.print(remark)
    versions = {**certificate.environment, **{name: v for name, v in certificate.versions.items() if v}}
    console.print(f"on {certificate.device}, {', '.join(f'{name} {number}' for name, number in versions.items())}")
    console.print(Text(certificate.verdict, "bold green" if certificate.passed else "bold red"))


def _row(path: PathResult) -> list[Text]:
    found: dict[str, Any] = path.compared
    gradients = "\n".join(f"{part} {_said(one['difference'])}" for part, one in found["gradients"].items())
    weights = [one["difference"] for one in found["weights"].values()]
    worst = found["worst_share_of_tolerance"]
    cells = [
        _said(found["loss"]["difference"]),
        gradients,
        _said(None if None in weights else max(weights, default=0.0)),
        "over" if worst is None else f"{worst:.2g}",
    ]
    return [Text(path.name), *map(Text, cells), Text(path.status, COLOURS[path.status])]


def _said(difference: float | None) -> str:
    """None is what is not there, or not finite."""
    return "none" if difference is None else f"{difference:.1e}"
