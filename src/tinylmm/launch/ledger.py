"""The records of the runs of a grid while its stages run: each run's run.json, its errors, and how it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinylmm.config.compose import run_name
from tinylmm.errors import ClaimLostError, DiskError, StoppedError, TinyLMMError, WaitingError, worst_exit_code
from tinylmm.planning.planner import RunPlan
from tinylmm.store.provenance import now
from tinylmm.store.runs import (
    RunRecord,
    RunStatus,
    StageRow,
    StageStatus,
    create_run,
    recorded_run,
    run_lock,
    write_run,
)
from tinylmm.store.stage import Stage

log = logging.getLogger(__name__)


@dataclass
class RunOutcome:
    """How a run ended.

    Attributes:
        error: what went wrong, or waits; None if all is done.
        came_to_end: whether every stage that could run has, and there are results to report.
    """

    name: str
    folder: Path
    exit_code: int
    error: str | None
    came_to_end: bool = False


def failed_before_start(overrides: list[str], error: TinyLMMError) -> RunOutcome:
    """The outcome of a run of a sweep that was refused before it had a folder."""
    return RunOutcome(" ".join(overrides), Path(), error.exit_code, str(error))


@dataclass
class Run:
    """A run of the grid.

    Attributes:
        rows: digest -> the stage as this run saw it.
        todo: digests of stages that are neither done nor given up.
        errors: of stages of this run, in the order in which they came.
        changed: whether its file is behind.
    """

    plan: RunPlan
    record: RunRecord
    rows: dict[str, StageRow]
    todo: set[str]
    errors: list[TinyLMMError] = field(default_factory=list)
    changed: bool = False

    @property
    def folder(self) -> Path:
        """Where its record lies."""
        return self.record.folder

    @property
    def status(self) -> RunStatus:
        """How it has ended."""
        if any(isinstance(error, StoppedError) for error in self.errors):
            return "stopped"
        if not self.errors:
            return "done"
        return "waiting" if all(isinstance(error, WaitingError) for error in self.errors) else "failed"


class Ledger:
    """All runs of a grid. Marks are kept in memory, and written by `flush` and when a run ends."""

    def __init__(self, plans: Sequence[RunPlan]) -> None:
        self.runs = [self._run(number, plan) for number, plan in enumerate(plans)]
        self._lock = threading.Lock()
        self._users: dict[str, list[Run]] = {}
        for run in self.runs:
            for digest in run.rows:
                self._users.setdefault(digest, []).append(run)

    def maker(self, stage: Stage) -> Run:
        """The run that a stage is made for: the first that asks for it."""
        return self._users[stage.digest][0]

    def mark(self, stage: Stage, status: StageStatus, seconds: float | None = None) -> list[Run]:
        """Note how a stage stands, for every run that asks for it; returns the runs that are over with it.

        What one run has made the others have reused.
        """
        over = []
        took = None if seconds is None else round(seconds, 2)
        for run in self._users[stage.digest]:
            made = run is self.maker(stage)
            mine = "reused" if status == "run" and not made else status
            row = replace(run.rows[stage.digest], status=mine, seconds=took if made else None)
            run.rows[stage.digest], run.changed = row, True
            if row.finished:
                run.todo.discard(stage.digest)
                over += self._ended(run)
        return over

    def give_up(self, stage: Stage, lost: Iterable[Stage], failure: TinyLMMError) -> list[Run]:
        """Note that a stage and what needs it have no result; returns the runs that are over with that."""
        over = []
        self.mark(stage, "todo" if isinstance(failure, StoppedError | WaitingError) else "failed")
        gone = {stage.digest, *(one.digest for one in lost)}
        for run in self._users[stage.digest]:
            run.errors.append(failure)
            run.todo -= gone
            over += self._ended(run)
        return over

    def end(self, failure: TinyLMMError) -> None:
        """End what is left of every run with one and the same failure: nothing more is started."""
        for run in self.runs:
            if run.todo:
                if not any(type(error) is type(failure) for error in run.errors):
                    run.errors.append(failure)
                run.todo.clear()
                self._ended(run)

    def flush(self) -> None:
        """Write the records that have changed."""
        with self._lock:
            for run in self.runs:
                if run.changed:
                    run.changed = False
                    self._write(run)

    def outcomes(self) -> list[RunOutcome]:
        """How each run ended, in the order of the plans."""
        return [_outcome(run) for run in self.runs]

    def _ended(self, run: Run) -> list[Run]:
        if run.todo:
            return []
        with self._lock:
            run.record = self._closed(run)
            run.changed = False
            self._write(run)
        return [run]

    def _run(self, number: int, plan: RunPlan) -> Run:
        """Make the run's folder, with every stage to do in its record."""
        run = plan.run
        rows = [StageRow(stage.kind, stage.name, stage.digest, stage.key) for stage in plan.graph]
        folder = create_run(run.store, run_name(run), run.name, plan.overrides, run.model_dump(mode="json"), rows)
        record = recorded_run(folder)
        return Run(plan, record, {row.digest: row for row in record.stages}, {row.digest for row in rows})

    def _closed(self, run: Run) -> RunRecord:
        return replace(run.record, status=run.status, finished=now())

    def _write(self, run: Run) -> None:
        run.record = self._as_it_is(run)
        try:
            write_run(run.folder, run.record)
        except (
            DiskError,
            ClaimLostError,
        ) as error:  # the record follows with its next change; no result is lost for it
            run.changed = True
            log.warning("%s", error)

    def _as_it_is(self, run: Run) -> RunRecord:
        return replace(run.record, stages=tuple(run.rows.values()))


class SharedLedger(Ledger):
    """Of a job that makes some stages of runs whose others are made elsewhere: it notes its own, and ends no run.

    Args:
        folders: of the runs, in the plans' order.
        own: digests of the stages that are made here.
    """

    def __init__(self, plans: Sequence[RunPlan], folders: Sequence[Path], own: Collection[str]) -> None:
        self._folders, self._own = folders, own
        super().__init__(plans)

    def _run(self, number: int, plan: RunPlan) -> Run:
        record = recorded_run(self._folders[number])
        rows = {row.digest: row for row in record.stages}
        return Run(plan, record, rows, rows.keys() & set(self._own))

    def _closed(self, run: Run) -> RunRecord:
        return run.record

    def _write(self, run: Run) -> None:
        with run_lock(run.folder):
            super()._write(run)

    def _as_it_is(self, run: Run) -> RunRecord:
        record = recorded_run(run.folder)
        return replace(record, stages=tuple(self._row(run, there) for there in record.stages))

    def _row(self, run: Run, there: StageRow) -> StageRow:
        """What is known of a stage here, unless it stands in the record that another machine of this job has made it."""
        own = run.rows[there.digest]
        made = there.status == "run" and own.status == "reused"
        return there if made or there.digest not in self._own else own


def _outcome(run: Run) -> RunOutcome:
    ended_early = any(isinstance(error, StoppedError | DiskError) for error in run.errors)
    judged = any(row.kind == "eval" and row.finished for row in run.rows.values())
    code = worst_exit_code(error.exit_code for error in run.errors)
    text = "\n".join(map(str, run.errors)) if run.errors else None
    return RunOutcome(run.folder.name, run.folder, code, text, not ended_early and (judged or not run.errors))
