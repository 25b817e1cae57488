"""Carries out a plan: reuse what the store has, claim and run what it lacks, publish, and keep the run's record."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tinylmm.config.compose import run_name
from tinylmm.errors import (
    ClaimLostError,
    DiskError,
    IntegrityError,
    StageFailedError,
    StoppedError,
    TinyLMMError,
    WaitingError,
    worst_exit_code,
)
from tinylmm.launch.backends import LaunchBackend, make_backend
from tinylmm.launch.memory import with_advice
from tinylmm.launch.progress import StageProgress
from tinylmm.launch.scheduler import in_order
from tinylmm.launch.worker import FAILED_RANKS, RESULT_FILE, WORDS_FOLDER, ShownFormatter
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.planner import RunPlan, require_files, waits_for
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stop import STOP_FILE, claimed, stop_requested, uninterrupted, watch_for_stop
from tinylmm.store.claims import Claim, Owner
from tinylmm.store.disk import refusal
from tinylmm.store.gc import remove
from tinylmm.store.integrity import read_manifest
from tinylmm.store.layout import ERROR_FILE, JOB_FILE, LOG_FILE, METRICS_FILE
from tinylmm.store.provenance import now
from tinylmm.store.runs import RunStatus, StageRow, StageStatus, create_run, read_run, write_run
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SCRATCH = (JOB_FILE, RESULT_FILE, STOP_FILE, FAILED_RANKS, WORDS_FOLDER)
"""Names in a work folder that are deleted when the stage is done, besides those of its kind."""


@dataclass
class RunOutcome:
    """How a run ended.

    Attributes:
        error: what went wrong, or waits; None if all is done.
        came_to_end: whether every stage that could run has, so that there are results to report.
    """

    name: str
    folder: Path
    exit_code: int
    error: str | None
    came_to_end: bool = False


def failed_before_start(overrides: list[str], error: TinyLMMError) -> RunOutcome:
    """The outcome of a run of a sweep that was refused before it had a folder."""
    return RunOutcome(" ".join(overrides), Path(), error.exit_code, str(error))


def execute(plan: RunPlan, console: Console) -> RunOutcome:
    """Run every stage of the plan that the store lacks, parents first, and record the run.

    Raises:
        DataError: files are missing; nothing was started or written.
    """
    require_files(plan)
    ledger = _Ledger(_create_run(plan), console)
    console.print(Text.assemble("run ", (ledger.folder.name, "bold")))
    for item in plan.not_found:
        console.print(
            f"  left out, as it is not found: {item.what}, looked for at {item.looked_at}",
            highlight=False,
            soft_wrap=True,
        )
    store = Store(plan.run.store)
    errors: list[TinyLMMError] = []
    lost: set[str] = set()
    came_to_end = True
    with _log_to(ledger.folder / LOG_FILE), watch_for_stop():
        for title, stage in in_order(plan.graph):
            if lost & set(stage.parents.values()):
                lost.add(stage.digest)
                continue
            try:
                seconds = _make(title, stage, plan, store, ledger)
                ledger.mark(stage, "reused" if seconds is None else "run", seconds)
                ledger.remark(read_manifest(store.folder(stage))["summary"].get("remarks", ()))
            except (KeyboardInterrupt, TinyLMMError) as failure:
                errors.append(with_advice(_noted(failure, stage, ledger), plan, stage))
                lost.add(stage.digest)
                came_to_end = _others_go_on(stage, errors[-1])
                if not came_to_end:
                    break
                ledger.tell_left_out(stage, errors[-1])
    ledger.finish(_status(errors))
    text = "\n".join(map(str, errors)) if errors else None
    code = worst_exit_code(error.exit_code for error in errors)
    return RunOutcome(ledger.folder.name, ledger.folder, code, text, came_to_end)


def _noted(failure: BaseException, stage: Stage, ledger: _Ledger) -> TinyLMMError:
    """Mark the stage that failed, was stopped or waits, and return what to say of it."""
    if not isinstance(failure, TinyLMMError):
        doing = f"{stage.kind} {stage.name}"
        failure = StoppedError(f"interrupted during {doing}; the same command continues with what it has kept")
    ledger.mark(stage, "todo" if isinstance(failure, StoppedError | WaitingError) else "failed")
    return failure


def _others_go_on(stage: Stage, failure: TinyLMMError) -> bool:
    """A failure ends the run, but that of an evaluation only what needs it: the others are worth their time."""
    return KINDS[stage.kind].others_go_on and not isinstance(failure, StoppedError | ClaimLostError | DiskError)


def _status(errors: Sequence[TinyLMMError]) -> RunStatus:
    if any(isinstance(error, StoppedError) for error in errors):
        return "stopped"
    if not errors:
        return "done"
    return "waiting" if all(isinstance(error, WaitingError) for error in errors) else "failed"


def _create_run(plan: RunPlan) -> Path:
    """Make the run's folder, with every stage to do in its record."""
    run = plan.run
    rows = [StageRow(stage.kind, stage.name, stage.digest, stage.key) for stage in plan.graph]
    return create_run(run.store, run_name(run), run.name, plan.overrides, run.model_dump(mode="json"), rows)


def _make(title: str, stage: Stage, plan: RunPlan, store: Store, ledger: _Ledger) -> float | None:
    """Make sure the store has the stage; returns the seconds it took to run, None if it was there.

    Raises:
        StoppedError: a stop was asked for.
        WaitingError: the stage waits for what only the user can give.
        TinyLMMError: the stage failed; its work folder says why, and the next try goes on from there.
    """
    if stop_requested():
        raise StoppedError(f"stopped before {stage.kind} {stage.name}; the same command continues from there")
    if said := waits_for(stage):
        raise WaitingError(said)
    if _reusable(stage, store, ledger.console):
        return None
    if any(digest not in plan.graph for digest in stage.parents.values()):
        raise IntegrityError(f"{stage.name} was made by another run. Give that run's command again to make it anew.")
    with Claim(store.root, stage.key, on_wait=ledger.waiting(title)) as claim:
        if store.recover(stage):  # finished by whom we waited for, or by a process killed while publishing
            return None
        ledger.mark(stage, "running")
        began, clock = time.time(), time.monotonic()
        job, kind = _job(stage, plan, store, claim.token), KINDS[stage.kind]
        backend = make_backend(plan.run.launch, kind.uses_ranks, plan.run.trust)
        watched = StageProgress(ledger.console, title, job.folder)
        with claimed(job.require_claim):
            with _kept_failures(store, stage, title), _log_to(job.folder / LOG_FILE), watched, _ended(backend):
                backend.start(job)
                while (summary := backend.poll()) is None:
                    if stop_requested():
                        backend.stop()
                    time.sleep(POLL_SECONDS)
            with uninterrupted():  # the work is done: what is left is to say so
                for name in (*SCRATCH, *kind.scratch):
                    remove(job.folder / name)
                (job.folder / METRICS_FILE).touch()
                store.publish(stage, summary, began)
        return time.monotonic() - clock


def _reusable(stage: Stage, store: Store, console: Console) -> bool:
    """Whether the store has the stage, every byte of it; a damaged one is named and asked for again."""
    if not store.is_complete(stage):
        return False
    try:
        store.open_output(stage)
    except IntegrityError as error:
        if store.is_complete(stage):  # whole, but for another spec: nothing to repair
            raise
        console.print(str(error), style="yellow", highlight=False)
        return False
    return True


def _job(stage: Stage, plan: RunPlan, store: Store, claim: str) -> StageJob[Any]:
    """Make the stage's work folder, with its job.json."""
    work, root = store.begin(stage).resolve(), store.root.resolve()
    parents = {role: store.open_output(plan.graph[digest]).resolve() for role, digest in stage.parents.items()}
    job = make_job(stage.kind, stage.name, stage.digest, stage.spec, parents, stage.settings, work, root, claim)
    job.write()
    return job


@contextmanager
def _ended(backend: LaunchBackend) -> Iterator[None]:
    """Leave nothing of a stage running behind the block."""
    try:
        yield
    finally:
        backend.stop(now=True)


@contextmanager
def _kept_failures(store: Store, stage: Stage, title: str) -> Iterator[None]:
    """Keep what went wrong in the work folder; a bug of ours becomes an error that says where its traceback is."""
    try:
        yield
    except (StoppedError, ClaimLostError, KeyboardInterrupt):  # nothing failed; or the folder is another's by now
        raise
    except TinyLMMError as error:
        store.fail(stage, f"{type(error).__name__}: {error}\n")
        raise
    except Exception as error:
        if (said := refusal(error, store.work_folder(stage))) is not None:
            raise DiskError(said) from error
        text = traceback.format_exc()
        store.fail(stage, text)
        log.error("%s failed\n%s", title, text)
        work = store.work_folder(stage)
        raise StageFailedError(
            f"{stage.kind} {stage.name} failed with {type(error).__name__}: {error}\n"
            f"  traceback: {work / ERROR_FILE}\n  log:       {work / LOG_FILE}\n"
            f"  The same command tries it again from its last checkpoint."
        ) from error


class _Ledger:
    """The run's run.json while it runs, and a line on the console for each stage that is done."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self._run = read_run(folder)
        self._mark = "✓" if console.encoding.lower().startswith("utf") else "ok"
        self._rows = {row.digest: row for row in self._run.stages}

    def mark(self, stage: Stage, status: StageStatus, seconds: float | None = None) -> None:
        took = None if seconds is None else round(seconds, 2)
        self._rows[stage.digest] = row = replace(self._rows[stage.digest], status=status, seconds=took)
        self._write()
        if row.finished:
            took_words = "reused" if seconds is None else f"{seconds:.1f} s"
            line = f" {stage.kind:8} {stage.name:24} {stage.digest[:12]}  {took_words}"
            self.console.print(Text.assemble("  ", (self._mark, "green"), line))

    def remark(self, sentences: Sequence[str]) -> None:
        """Say what the stage that was just marked has left out."""
        for sentence in sentences:
            self.console.print(f"      {sentence}", style="yellow", highlight=False)

    def tell_left_out(self, stage: Stage, failure: TinyLMMError) -> None:
        """Say at once that a stage has no result; why is said again when the run ends."""
        what = "waits" if isinstance(failure, WaitingError) else "failed"
        said = f"  {stage.kind} {stage.name} {what}, what does not need it goes on: {failure}"
        self.console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def waiting(self, title: str) -> Callable[[Owner], None]:
        """Return what tells of another process that works on the stage."""

        def tell(owner: Owner) -> None:
            self.console.print(Text(f"{title}  waiting: process {owner.pid} on {owner.host} is doing it"))

        return tell

    def finish(self, status: RunStatus) -> None:
        self._run = replace(self._run, status=status, finished=now())
        self._write()

    def _write(self) -> None:
        self._run = replace(self._run, stages=tuple(self._rows.values()))
        try:
            write_run(self.folder, self._run)
        except DiskError as error:  # the record follows with its next change; what the run does is not lost for it
            log.warning("%s", error)


class _LogFile(logging.FileHandler):
    """A log that goes on where a line cannot be written: a full disk is said by what has a result to write, in one sentence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send the package's log to a file while the block runs."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
