"""Carries out plans: one graph of all their stages, each reused or claimed, run and published once."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tinylmm.errors import (
    ClaimLostError,
    DiskError,
    IntegrityError,
    StageFailedError,
    StoppedError,
    TinyLMMError,
    WaitingError,
)
from tinylmm.launch.backends import LaunchBackend, make_backend
from tinylmm.launch.estimate import Estimate, expected_seconds
from tinylmm.launch.ledger import Ledger, Run, RunOutcome
from tinylmm.launch.memory import with_advice
from tinylmm.launch.nodes import MEETING_FILE, Joined
from tinylmm.launch.progress import Progress
from tinylmm.launch.results import failed_with
from tinylmm.launch.scheduler import Schedule
from tinylmm.launch.slots import Slots
from tinylmm.launch.worker import FAILED_RANKS, RESULT_FILE, WORDS_FOLDER, ShownFormatter
from tinylmm.planning.estimates import settled_settings
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.planner import RunPlan, require_files, waits_for
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stop import STOP_FILE, claimed, stop_requested, uninterrupted, watch_for_stop
from tinylmm.store.claims import Claim
from tinylmm.store.disk import refusal
from tinylmm.store.gc import remove
from tinylmm.store.integrity import read_manifest
from tinylmm.store.layout import JOB_FILE, LOG_FILE, METRICS_FILE
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
SCRATCH = (JOB_FILE, RESULT_FILE, STOP_FILE, MEETING_FILE, FAILED_RANKS, WORDS_FOLDER)
"""Names in a work folder that are deleted when the stage is done, besides those of its kind."""


def execute(
    plans: Sequence[RunPlan], console: Console, ledger: Ledger | None = None, only: Collection[str] | None = None
) -> list[RunOutcome]:
    """Run every stage that the plans ask for and the store lacks, and record the runs; returns how each ended.

    Args:
        plans: the runs.
        console: where progress is shown.
        ledger: the runs' records, where they exist already.
        only: digests of the stages to run, where others are run elsewhere: their parents are there.

    A stage that several plans ask for runs once, stages that need nothing of each other run side by side as far as there
    is room (`launch.slots`), and a stage that fails takes nothing with it but what needs it.

    Raises:
        DataError: files are missing; nothing was started or written.
        UserError: there is no room for so many stages side by side.
    """
    for plan in plans:
        require_files(plan)
    grid = _Grid(plans, console, Ledger(plans) if ledger is None else ledger, only)
    with _log_to(grid.ledger.runs[0].folder / LOG_FILE), watch_for_stop(), grid.progress, grid:
        try:
            while not grid.over:
                if stop_requested():
                    grid.stop()
                if (stage := grid.next()) is not None:
                    grid.start(stage)
                if not grid.poll() and stage is None:
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            grid.give_up()
    return grid.outcomes()


@dataclass
class _Task:
    """A stage under way."""

    stage: Stage
    run: Run
    job: StageJob[Any]
    backend: LaunchBackend
    held: ExitStack
    """What is given back when the stage has ended: its claim and its place; and nothing of it may run then."""
    began: float
    """In seconds since the epoch."""


class _Grid:
    """The stages of all plans, and those under way. As a context manager it leaves nothing running behind."""

    def __init__(
        self, plans: Sequence[RunPlan], console: Console, ledger: Ledger, only: Collection[str] | None
    ) -> None:
        self.slots = Slots([plan.run.launch for plan in plans])
        self.store = Store(plans[0].run.store)
        self.ledger = ledger
        self.joined = Joined(self.store)
        self.stages = stages = {stage.digest: stage for plan in plans for stage in plan.graph}
        self.schedule = Schedule(stage for digest, stage in stages.items() if only is None or digest in only)
        self.console = console
        estimate = Estimate(lambda stage: expected_seconds(self.ledger.maker(stage).plan, stage))
        self.progress = Progress(console, self.slots.number, self.schedule.open_stages, self.ledger.flush, estimate)
        self._titles = {
            digest: f"stage {number} of {len(stages)}: {stage.kind} {stage.name}"
            for number, (digest, stage) in enumerate(stages.items(), 1)
        }
        self._tasks: list[_Task] = []
        self._closing: TinyLMMError | None = None
        """Why nothing more is started."""
        self._greet(plans)

    def __enter__(self) -> _Grid:
        return self

    def __exit__(self, *ended: object) -> None:
        for task in self._tasks:
            task.held.close()
        self.joined.stop(now=True)

    @property
    def over(self) -> bool:
        """Whether nothing runs, and nothing is to be started."""
        under_way = self._tasks or self.joined.busy
        return not under_way and (self.schedule.over or self._closing is not None)

    def next(self) -> Stage | None:
        """The stage to start now, if there is one and a place for it."""
        return self.schedule.next() if self.slots.free and self._closing is None else None

    def start(self, stage: Stage) -> None:
        """Take a stage from the store, or claim and start it; give it back if another process works on it."""
        run, held = self.ledger.maker(stage), ExitStack()
        with self._log_of(run), held:
            try:
                if said := waits_for(stage):
                    raise WaitingError(said)
                if self._is_there(stage) or (claim := self._claim(stage, run, held)) is None:
                    return
                task = self._task(stage, run, claim, held)
                self.progress.begins(stage, self._titles[stage.digest], task.job.folder)
                self.ledger.mark(stage, "running")
                with claimed(task.job.require_claim), self._kept_failures(stage), _log_to(task.job.folder / LOG_FILE):
                    task.backend.start(task.job)
            except (KeyboardInterrupt, TinyLMMError) as failure:
                self._lose(stage, failure)
                if self._tasks and isinstance(
                    failure, KeyboardInterrupt
                ):  # the user has lost patience with all of them
                    raise
            else:
                task.held = held.pop_all()
                self._tasks.append(task)

    def poll(self) -> bool:
        """See to the stages that have ended; returns whether there were any."""
        ended = False
        self.joined.poll()
        for task in list(self._tasks):
            try:
                with claimed(task.job.require_claim), self._kept_failures(task.stage):
                    task.job.require_claim()
                    summary = task.backend.poll()
                    if summary is None:
                        continue
                    with self._log_of(task.run):
                        self._publish(task, summary)
            except TinyLMMError as failure:
                self._leave(task)
                self._lose(task.stage, failure)
            else:
                self._leave(task)
                self._keep(task.stage, time.time() - task.began)
            ended = True
        return ended

    def stop(self) -> None:
        """Start nothing more, and ask what runs to save and stop."""
        if self._closing is None:
            self._closing = StoppedError("stopped before all was done; the same command continues from there")
        for task in self._tasks:
            task.backend.stop()
        self.joined.stop()

    def give_up(self) -> None:
        """End everything at once."""
        self.stop()
        self.joined.stop(now=True)
        for task in list(self._tasks):
            self._leave(task)
            self._lose(task.stage, KeyboardInterrupt())

    def outcomes(self) -> list[RunOutcome]:
        """How each run ended."""
        if self._closing is not None:
            self.ledger.end(self._closing)
        self.ledger.flush()
        return self.ledger.outcomes()

    # ------------------------------------------------------------------------------------------------ one stage

    def _is_there(self, stage: Stage) -> bool:
        """Whether the store has the stage, every byte of it; a damaged one is named and made again."""
        if not self.store.is_complete(stage):
            return False
        try:
            self.store.open_output(stage)
        except IntegrityError as error:
            if self.store.is_complete(stage):  # whole, but for another spec: nothing to repair
                raise
            self.console.print(str(error), style="yellow", highlight=False)
            return False
        self._keep(stage, None)
        return True

    def _claim(self, stage: Stage, run: Run, held: ExitStack) -> Claim | None:
        """Claim a stage; None where another process has it, or where it is there by now."""
        if any(digest not in self.stages for digest in stage.parents.values()):
            raise IntegrityError(
                f"{stage.name} was made by another run. Give that run's command again to make it anew."
            )
        claim = Claim(self.store.root, stage.key)
        if (owner := claim.try_acquire()) is not None:
            self.progress.waits(stage, self._titles[stage.digest], owner)
            self.joined.join(stage.key, owner, run.plan.run.launch)
            self.schedule.postpone(stage)
            return None
        held.callback(claim.release)
        if self.store.recover(stage):  # finished by whom we waited for, or by a process killed while publishing
            self._keep(stage, None)
            return None
        self.joined.refuse_to_lead(stage.key)
        return claim

    def _task(self, stage: Stage, run: Run, claim: Claim, held: ExitStack) -> _Task:
        """Make the stage's work folder, with its job.json, and find it a place and a backend."""
        share = self.slots.take(self.schedule.num_ready)
        held.callback(self.slots.give_back, share)
        work, root = self.store.begin(stage).resolve(), self.store.root.resolve()
        parents = {
            role: self.store.open_output(self.stages[digest]).resolve() for role, digest in stage.parents.items()
        }
        names = (stage.kind, stage.name, stage.digest)
        others = [one for one in self.schedule.open_stages() if one is not stage]
        after = self.progress.estimate.left(others, {}, self.slots.number)
        settings = settled_settings(run.plan, stage)
        job = make_job(*names, stage.spec, parents, settings, work, root, claim.token, share, after_s=after)
        job.write()
        launch, uses_ranks = run.plan.run.launch, KINDS[stage.kind].uses_ranks
        backend = make_backend(launch, uses_ranks, run.plan.run.trust, self.slots.side_by_side)
        held.callback(backend.stop, now=True)
        return _Task(stage, run, job, backend, held, time.time())

    def _publish(self, task: _Task, summary: dict[str, Any]) -> None:
        folder = task.job.folder
        with uninterrupted():  # the work is done: what is left is to say so
            peak = _peak(folder)
            for name in (*SCRATCH, *KINDS[task.stage.kind].scratch):
                remove(folder / name)
            (folder / METRICS_FILE).touch()
            self.store.publish(task.stage, summary, task.began, peak)

    def _leave(self, task: _Task) -> None:
        """Give back what an ended stage held."""
        self._tasks.remove(task)
        task.held.close()

    def _keep(self, stage: Stage, seconds: float | None) -> None:
        """Note that a stage has its result, after so many seconds of work; None where it was there."""
        manifest = read_manifest(self.store.folder(stage))
        self.schedule.done(stage)
        self.progress.estimate.learn(stage, float(manifest["seconds"]))
        self.progress.ends(stage, seconds, manifest["summary"].get("remarks", ()))
        self._tell(self.ledger.mark(stage, "reused" if seconds is None else "run", seconds))

    def _lose(self, stage: Stage, failure: BaseException) -> None:
        """Note that a stage has no result, and what of the rest goes on."""
        if not isinstance(failure, TinyLMMError):
            doing = f"{stage.kind} {stage.name}"
            failure = StoppedError(f"interrupted during {doing}; the same command continues with what it has kept")
        failure = with_advice(failure, self.ledger.maker(stage).plan, stage)
        self.progress.leaves(stage)
        if isinstance(failure, StoppedError | DiskError):
            self._closing = self._closing or failure
        over = self.ledger.give_up(stage, self.schedule.failed(stage), failure)
        if self._closing is None and not self.schedule.over:
            what = "waits" if isinstance(failure, WaitingError) else "failed"
            said = f"  {stage.kind} {stage.name} {what}, what does not need it goes on: {failure}"
            self.console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
        self._tell(over)

    # ------------------------------------------------------------------------------------------------ words

    def _greet(self, plans: Sequence[RunPlan]) -> None:
        if len(plans) == 1:
            self.console.print(Text.assemble("run ", (self.ledger.runs[0].folder.name, "bold")))
        else:
            asked, distinct = sum(len(plan.graph) for plan in plans), len(self.schedule.stages)
            self.console.print(
                f"{len(plans)} runs ask for {asked} stages, {distinct} of them distinct", highlight=False
            )
        for item in dict.fromkeys(item for plan in plans for item in plan.not_found):
            self.console.print(
                f"  left out, as it is not found: {item.what}, looked for at {item.looked_at}",
                highlight=False,
                soft_wrap=True,
            )

    def _tell(self, over: Sequence[Run]) -> None:
        """Of several runs, say of each when it is over, with the words that tell it from the others."""
        if len(self.ledger.runs) > 1:
            common = set.intersection(*(set(run.plan.overrides) for run in self.ledger.runs))
            for run in over:
                varied = " ".join(word for word in run.plan.overrides if word not in common)
                self.console.print(Text.assemble("run ", (run.folder.name, "bold"), f"  {run.status}  {varied}"))

    @contextmanager
    def _log_of(self, run: Run) -> Iterator[None]:
        """Log to a run's file besides the first run's, which has the whole grid's log."""
        if run is self.ledger.runs[0]:
            yield
        else:
            with _log_to(run.folder / LOG_FILE):
                yield

    @contextmanager
    def _kept_failures(self, stage: Stage) -> Iterator[None]:
        """Keep what went wrong in the work folder; a bug of ours becomes an error that says where its traceback is."""
        store = self.store
        try:
            yield
        except (StoppedError, ClaimLostError, KeyboardInterrupt):  # nothing failed; or the folder is another's by now
            raise
        except TinyLMMError as error:
            notes = getattr(error, "__notes__", [])
            store.fail(stage, "\n".join([f"{type(error).__name__}: {error}", *notes, ""]))
            raise
        except Exception as error:
            work = store.work_folder(stage)
            if (said := refusal(error, work)) is not None:
                raise DiskError(said) from error
            text = traceback.format_exc()
            store.fail(stage, text)
            log.error("%s failed\n%s", self._titles[stage.digest], text)
            said = failed_with(stage.kind, stage.name, f"{type(error).__name__}: {error}", work)
            raise StageFailedError(said) from error


def _peak(folder: Path) -> float | None:
    """The most memory that a worker process took, MiB, as it left it; None where this process was the worker."""
    path = folder / RESULT_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("peak_rss_mib") if path.exists() else None


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
