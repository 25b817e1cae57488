"""Carries out a plan: reuse what the store has, claim and run what it lacks, publish, and keep the run's record."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tinylmm.config.compose import run_name
from tinylmm.errors import EXIT_DONE, IntegrityError, StageFailedError, StoppedError, TinyLMMError
from tinylmm.launch.backends.torchrun import LOG_FILE, run_ranks
from tinylmm.launch.progress import StageProgress
from tinylmm.launch.worker import RESULT_FILE, run_stage
from tinylmm.planning.graph import Stage
from tinylmm.planning.planner import RunPlan, require_files
from tinylmm.stages.job import JOB_FILE, METRICS_FILE, StageJob
from tinylmm.stop import STOP_FILE, watch_for_stop
from tinylmm.store.claims import Claim
from tinylmm.store.gc import remove
from tinylmm.store.provenance import now
from tinylmm.store.runs import create_run, write_run
from tinylmm.store.store import Store

log = logging.getLogger(__name__)

MULTI_RANK_KINDS = {"train", "eval"}
"""Stage kinds that use every rank of the launch; the others are short and run in this process."""
SCRATCH = (JOB_FILE, RESULT_FILE, STOP_FILE, "features.part", "answers")


@dataclass
class RunOutcome:
    """How a run ended."""

    name: str
    folder: Path
    exit_code: int
    error: str | None


def failed_before_start(overrides: list[str], error: TinyLMMError) -> RunOutcome:
    """The outcome of a run of a sweep that was refused before it had a folder."""
    return RunOutcome(" ".join(overrides), Path(), error.exit_code, str(error))


def execute(plan: RunPlan, console: Console) -> RunOutcome:
    """Run every stage of the plan that the store lacks, parents first, and record the run.

    Raises:
        DataError: files are missing; nothing was started or written.
    """
    require_files(plan)
    run = plan.run
    store = Store(run.store)
    record: dict[str, Any] = {
        "overrides": plan.overrides,
        "spec": run.model_dump(mode="json"),
        "stages": [
            {"kind": s.kind, "name": s.name, "digest": s.digest, "key": s.key, "status": "todo", "seconds": None}
            for s in plan.graph
        ],
    }
    if run.name is not None:
        record["name"] = run.name
    folder = create_run(run.store, run_name(run), record)
    ledger = _Ledger(folder, console)
    console.print(f"run [bold]{folder.name}[/bold]", highlight=False)
    with _log_to(folder / LOG_FILE), watch_for_stop():
        error = _run_stages(plan, store, ledger)
    code = EXIT_DONE if error is None else getattr(error, "exit_code", 1)
    ledger.finish("done" if error is None else "stopped" if isinstance(error, StoppedError) else "failed")
    return RunOutcome(folder.name, folder, code, None if error is None else str(error))


def _run_stages(plan: RunPlan, store: Store, ledger: _Ledger) -> BaseException | None:
    """Return the error that ended the run, or None."""
    total = len(plan.graph)
    for number, stage in enumerate(plan.graph, 1):
        try:
            seconds = _ensure(
                stage, plan, store, ledger, escape(f"stage {number} of {total}: {stage.kind} {stage.name}")
            )
        except KeyboardInterrupt:
            ledger.mark(stage, "failed")
            return StoppedError(
                f"interrupted during {stage.kind} {stage.name}; the same command continues from its last checkpoint"
            )
        except TinyLMMError as error:
            ledger.mark(stage, "failed" if not isinstance(error, StoppedError) else "todo")
            return error
        ledger.mark(stage, "reused" if seconds is None else "run", seconds)
    return None


def _ensure(stage: Stage, plan: RunPlan, store: Store, ledger: _Ledger, title: str) -> float | None:
    """Make sure the store has the stage; returns the seconds it took to run, None if it was there."""
    if _reusable(stage, store, ledger.console):
        return None

    def waiting(owner: dict[str, Any]) -> None:
        ledger.console.print(
            f"{title}  waiting: process {owner.get('pid')} on {owner.get('host')} is doing it", highlight=False
        )

    with Claim(store.root, stage.key, on_wait=waiting) as claim:
        if store.recover(stage):  # finished by whom we waited for, or by a process killed while publishing
            return None
        ledger.mark(stage, "running")
        return _run(stage, plan, store, ledger.console, title, claim)


def _reusable(stage: Stage, store: Store, console: Console) -> bool:
    """Whether the store has the stage, every byte of it; a damaged one is named and asked for again."""
    if not store.is_complete(stage):
        return False
    try:
        store.open_output(stage)
    except IntegrityError as error:
        if store.is_complete(stage):  # whole, but for another spec: nothing to repair
            raise
        console.print(str(error), style="yellow", highlight=False, markup=False)
        return False
    return True


def _run(stage: Stage, plan: RunPlan, store: Store, console: Console, title: str, claim: Claim) -> float:
    started, clock = time.time(), time.monotonic()
    work = store.begin(stage)
    parents = {role: store.open_output(plan.graph[digest]) for role, digest in stage.parents.items()}
    settings = stage.settings | {"features_root": str(store.root.resolve() / "features")}
    job = StageJob(
        stage.kind,
        stage.name,
        stage.digest,
        stage.spec,
        {r: p.resolve() for r, p in parents.items()},
        settings,
        work.resolve(),
    )
    job.write()
    try:
        with _log_to(work / LOG_FILE), StageProgress(console, title, work):
            many = plan.run.launch.backend == "torchrun" and stage.kind in MULTI_RANK_KINDS
            summary = run_ranks(job) if many else run_stage(job)
    except (StoppedError, KeyboardInterrupt):
        raise
    except TinyLMMError as error:
        store.fail(stage, f"{type(error).__name__}: {error}\n")
        raise
    except Exception as error:
        text = traceback.format_exc()
        store.fail(stage, text)
        log.error("%s failed\n%s", title, text)
        raise StageFailedError(
            f"{stage.kind} {stage.name} failed with {type(error).__name__}: {error}\n"
            f"  traceback: {work / 'error.txt'}\n  log:       {work / LOG_FILE}\n"
            f"  The same command tries it again from its last checkpoint."
        ) from error
    for name in SCRATCH:
        remove(work / name)
    (work / METRICS_FILE).touch()
    if claim.lost:
        raise StageFailedError(
            f"{title}: another process took this stage over while this one was silent for a minute; "
            "its result is left to that process"
        )
    store.publish(stage, summary, started)
    return time.monotonic() - clock


class _Ledger:
    """The run's run.json while it runs, and a line on the console for each stage that is done."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.rows = {row["digest"]: row for row in self.record["stages"]}

    def mark(self, stage: Stage, status: str, seconds: float | None = None) -> None:
        row = self.rows[stage.digest]
        row["status"] = status
        row["seconds"] = None if seconds is None else round(seconds, 2)
        write_run(self.folder, self.record)
        if status in ("run", "reused"):
            took = "reused" if seconds is None else f"{seconds:.1f} s"
            self.console.print(
                f"  [green]✓[/green] {stage.kind:8} {escape(stage.name):24} {stage.digest[:12]}  {took}",
                highlight=False,
            )

    def finish(self, status: str) -> None:
        self.record["status"] = status
        self.record["finished"] = now()
        write_run(self.folder, self.record)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send the package's log to a file while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
