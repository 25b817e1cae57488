"""`tinylmm store ls|verify|gc` and `tinylmm runs`: look after stored stages, see what ran. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from tinylmm.cli.terminal import echo_json, terminal
from tinylmm.errors import EXIT_STAGE_FAILED, UserError, suggestion
from tinylmm.store.claims import held
from tinylmm.store.gc import folders
from tinylmm.store.layout import StoreLayout
from tinylmm.store.queue import queued
from tinylmm.store.runs import RunRecord, describe, read_runs, used_digests
from tinylmm.store.store import Store

app = typer.Typer(help="Look after the store of finished stages.", no_args_is_help=True)

StoreOption = Annotated[Path, typer.Option("--store", envvar="TINYLMM_STORE", help="The store's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DEFAULT_STORE = Path("store")


@app.command("ls")
def list_stages(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List finished stages, features, kept images and the cache: what they are, how large, which runs use them."""
    rows = _open(store).ls()
    if as_json:
        echo_json([vars(row) for row in rows])
        return
    table = Table(
        _uncut_column("folder"),
        "name",
        "size",
        "finished",
        "status",
        "used by",
        title=f"{len(rows)} folders in {store}",
    )
    for row in rows:
        status = _coloured(row.status)
        table.add_row(row.key, row.name, decimal(row.size), _minute(row.finished), status, _users(row.runs))
    _console().print(table)


@app.command("verify")
def verify(
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Stages, features or images to check, as `ls` names them; all by default."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    quick: Annotated[bool, typer.Option("--quick", help="Presence and sizes only; do not read the files.")] = False,
) -> None:
    """Check stored stages, features and images by their checksums; exit code 1 if a file is missing, altered or added."""
    opened = _open(store)
    chosen = _chosen(opened, keys or [])
    problems: list[tuple[str, str]] = []
    for folder in chosen:
        if held(opened.root, folder.name):
            _console().print(f"{folder.name} is being worked on; not checked")
            continue
        problems += [(folder.name, problem) for problem in opened.verify(folder, deep=not quick)]
    damaged = len({key for key, _ in problems})
    if not problems:
        _console().print(f"{len(chosen)} folders checked: all whole")
        return
    _console().print(f"{damaged} of {len(chosen)} folders damaged:")
    for _, problem in problems:
        _console().print(problem, highlight=False, soft_wrap=True)  # whole lines, so they can be searched
    _console().print(
        "What is damaged is never used: the next run that needs it makes it anew (a damaged stage is set aside)."
    )
    raise typer.Exit(EXIT_STAGE_FAILED)


@app.command("gc")
def collect_garbage(
    store: StoreOption = DEFAULT_STORE,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would be deleted.")] = False,
) -> None:
    """Delete what no run uses: stages, abandoned work, features, images, old fingerprints, stages set aside as damaged."""
    opened = _open(store)
    rows = opened.gc(used_digests(opened.root), dry_run=not yes)
    if not rows:
        _console().print(
            "Nothing to delete: everything is used by a run (delete a folder under runs/ to give a run up)."
        )
        return
    table = Table(_uncut_column("folder"), "size", title="deleted" if yes else "would be deleted")
    for row in rows:
        table.add_row(row.folder, decimal(row.size))
    _console().print(table)
    total = decimal(sum(row.size for row in rows))
    _console().print(f"{total} freed." if yes else f"{total} would be freed. Nothing was deleted; add --yes to do so.")


def runs(
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    cancel: Annotated[
        str | None, typer.Option(metavar="RUN", help="End the jobs of a run that was queued with launch=slurm.")
    ] = None,
) -> None:
    """List runs, newest first: status, stages done, what is being worked on."""
    opened = _open(store)
    if cancel is not None:
        _cancel(opened, cancel)
        return
    rows = read_runs(opened.root)
    if as_json:
        echo_json([_as_json(run) for run in rows])
        return
    alive = [job for run in rows if run.status == "running" for job in run.jobs.values()]
    states = queued(alive) if alive else {}
    remarks = [_remarks(run, states) for run in rows]
    table = Table(
        _uncut_column("run"),
        _uncut_column("status"),
        "created",
        _uncut_column("stages"),
        title=f"{len(rows)} runs in {store}",
    )
    if any(remarks):
        table.add_column("remarks")
    for run, remark in zip(rows, remarks, strict=True):
        progress = f"{sum(stage.finished for stage in run.stages)}/{len(run.stages)}"
        cells: list[str | Text] = [run.name, _coloured(run.status), _minute(run.created), progress]
        table.add_row(*cells, *([remark] if any(remarks) else []))
    _console().print(table)


def _cancel(store: Store, name: str) -> None:
    from tinylmm.launch.slurm import cancel

    there = {run.name: run for run in read_runs(store.root)}
    if name not in there:
        raise UserError(f"--cancel: there is no run {name!r} in {store.root}. {suggestion(name, there)}")
    ended = cancel(there[name])
    _console().print(f"ended {len(ended)} jobs of {name}: {', '.join(ended)}", highlight=False)


def _open(store: Path) -> Store:
    if not store.is_dir():
        raise UserError(
            f"--store: there is no store at {store.absolute()}. A run makes it; name another one with --store PATH "
            "or the environment variable TINYLMM_STORE."
        )
    return Store(store)


def _chosen(store: Store, keys: list[str]) -> list[Path]:
    layout = StoreLayout(store.root)
    there = {
        folder.name: folder
        for place in (layout.stages, layout.features, layout.pixels, layout.published)
        for folder in folders(place)
    }
    for key in keys:
        if key not in there:
            raise UserError(
                f"verify: there is no finished stage {key!r} in {store.root}. {suggestion(key, there)} "
                "`tinylmm store ls` lists them."
            )
    return [there[key] for key in keys] if keys else list(there.values())


def _as_json(run: RunRecord) -> dict[str, Any]:
    """The content of run.json and where it lies, or why it cannot be read."""
    if run.status == "unreadable":
        content = {"name": run.name, "status": run.status, "created": run.created, "problem": run.problem, "stages": []}
    else:
        content = run.as_json()
    return {**content, "folder": str(run.folder)}


def _remarks(run: RunRecord, states: Mapping[str, str] | None) -> str:
    if run.status == "unreadable":
        return run.problem
    if run.status == "running":
        active = [stage.name for stage in run.stages if stage.status == "running"]
        who = _in_queue(run, states) if run.jobs else describe(run)
        return who + (f": {', '.join(active)}" if active else "")
    return ", ".join(f"{stage.name} failed" for stage in run.stages if stage.status == "failed")


def _in_queue(run: RunRecord, states: Mapping[str, str] | None) -> str:
    jobs = set(run.jobs.values())
    if states is None:
        return f"jobs {', '.join(sorted(jobs, key=int))}"
    counted = Counter(states[job].lower() for job in jobs & states.keys())
    return ", ".join(f"{number} jobs {state}" for state, number in sorted(counted.items()))


def _users(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _minute(time: str | None) -> str:
    return time[:16].replace("T", " ") if time else ""


def _coloured(status: str) -> Text:
    colours = {"complete": "green", "done": "green", "running": "cyan", "damaged": "red", "failed": "red"}
    return Text(status, colours.get(status, "yellow"))


def _uncut_column(title: str) -> Column:
    """A column of names that people copy: other columns give way first, and nothing is cut off."""
    return Column(title, no_wrap=True, overflow="fold")


def _console() -> Console:
    return terminal()  # made at use, so that it writes to the standard output of that moment
