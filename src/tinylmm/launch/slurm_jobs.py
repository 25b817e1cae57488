"""What the jobs of a grid do on SLURM's machines: make one stage, or close the runs when all have ended.

submitit calls these by what was pickled when they were queued, so each says in plain values what it needs.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tinylmm.config.spec import RunSpec
from tinylmm.errors import (
    EXIT_STOPPED,
    StageFailedError,
    StoppedError,
    TinyLMMError,
    UserError,
    WaitingError,
    printable,
    worst_exit_code,
)
from tinylmm.launch.ledger import RunOutcome, SharedLedger
from tinylmm.launch.runner import execute
from tinylmm.planning.planner import RunPlan, plan_run, require_files
from tinylmm.stop import watch_for_stop
from tinylmm.store.layout import ERROR_FILE, LOG_FILE, MARKER_FILE, StoreLayout
from tinylmm.store.provenance import now
from tinylmm.store.runs import RunRecord, RunStatus, StageRow, recorded_run, run_lock, write_run

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission
log = logging.getLogger(__name__)

Terminal = Callable[[], Console]
Report = Callable[[list[RunOutcome], Console], int]
"""Reports the runs that have ended, and returns the exit code."""


@dataclass(frozen=True)
class MakeStage:
    """What a job does: one stage of some runs. On several machines each calls it, and one of them leads.

    Attributes:
        runs: folders of the runs that ask for the stage.
        requeues: how often a job that is out of time is queued again.
        terminal: makes what progress is written to; a function of a module.
    """

    runs: tuple[str, ...]
    digest: str
    requeues: int
    terminal: Terminal

    def __call__(self) -> None:
        """Make the stage; ends this process with the exit code that the command would end with."""
        folders = [Path(run) for run in self.runs]
        plans = [_plan_again(folder, self.digest) for folder in folders]
        ledger = SharedLedger(plans, folders, {self.digest})
        with watch_for_stop() as stop:
            outcomes = execute(plans, self.terminal(), ledger, {self.digest})
        for error in dict.fromkeys(outcome.error for outcome in outcomes if outcome.error is not None):
            sys.stderr.write(printable(f"{error}\n"))
        code = worst_exit_code(outcome.exit_code for outcome in outcomes)
        if code == EXIT_STOPPED and stop.number == signal.SIGUSR2 and os.environ.get("SLURM_PROCID") == "0":
            self._queue_again()
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """How submitit queues a job again that is warned before it has begun to work."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _queue_again(self) -> None:
        """A job that was warned of its end goes back into the queue, and continues from what it has just saved."""
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < self.requeues:
            done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            if done.returncode > 0:  # below 0: ended with the job, as it was asked to
                log.error("SLURM does not queue the job again; the same command does")


@dataclass(frozen=True)
class CloseRuns:
    """What the last job does: note how the runs have ended, and report them.

    Attributes:
        terminal, report: functions of modules.
    """

    runs: tuple[str, ...]
    terminal: Terminal
    report: Report

    def __call__(self) -> None:
        """Close all runs."""
        self.report([outcome_of(close_run(Path(run))) for run in self.runs], self.terminal())


def _plan_again(folder: Path, digest: str) -> RunPlan:
    """The plan of a run, as its record has it, against the files as they are now.

    Raises:
        UserError: they have changed since.
    """
    record = recorded_run(folder)
    plan = plan_run(RunSpec.model_validate(record.spec), record.name, record.overrides)
    require_files(plan)
    if all(stage.digest != digest for stage in plan.graph):
        raise UserError(
            f"run {record.name}: files that it reads have changed since it was queued. Give its command again: what they "
            "decide is made anew."
        )
    return plan


def close_run(folder: Path) -> RunRecord:
    """Say in a run's record how it has ended, by what the store has; returns it."""
    with run_lock(folder):
        record = recorded_run(folder)
        layout = StoreLayout(folder.resolve().parents[1])
        rows = tuple(_settled(row, layout) for row in record.stages)
        left = [row for row in rows if not row.finished]
        status: RunStatus = "done" if not left else "stopped"
        if any(row.status == "failed" for row in left):
            status = "failed"
        elif left and all(row.kind == "judge" for row in left):
            status = "waiting"
        closed = replace(record, stages=rows, status=status, finished=now(), jobs={})
        write_run(folder, closed)
    return closed


def _settled(row: StageRow, layout: StoreLayout) -> StageRow:
    """A stage that another command's job has made is reused; one whose job was ended is to do."""
    if row.finished or row.status == "failed":
        return row
    there = (layout.stage(row.key) / MARKER_FILE).exists()
    return replace(row, status="reused" if there else "todo")


def outcome_of(record: RunRecord) -> RunOutcome:
    lost = [row for row in record.stages if not row.finished]
    named = ", ".join(f"{row.kind} {row.name}" for row in lost)
    error: TinyLMMError | None = None
    if record.status == "failed":
        error = StageFailedError("\n".join(_what_failed(row, record) for row in lost if row.status == "failed"))
    elif record.status == "waiting":
        error = WaitingError(f"{named}: waiting for a judge")
    elif record.status != "done":
        error = StoppedError(f"{named}: not done; the same command continues")
    judged = any(row.kind == "eval" and row.finished for row in record.stages)
    code, text = (0, None) if error is None else (error.exit_code, str(error))
    return RunOutcome(record.name, record.folder, code, text, record.status == "done" or judged)


def _what_failed(row: StageRow, record: RunRecord) -> str:
    """What a job has left in its stage's folder when it failed."""
    folder = StoreLayout(record.folder.parents[1]).work_on(row.key)
    path = folder / ERROR_FILE
    said = path.read_text(encoding="utf-8").strip() if path.exists() else "failed without a word"
    return f"{row.kind} {row.name}: {said}\n  log: {folder / LOG_FILE}"
