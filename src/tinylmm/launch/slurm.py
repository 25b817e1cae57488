"""Every stage of a grid as a job of SLURM, through submitit: queued with what it needs, so that the command may end.

A job is the same command's work on one stage (`execute` with `only`), on as many machines as the launch says; a last job notes
how the runs have ended and writes their report. What one command has queued another one waits for instead of queueing it again.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.console import Console

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import (
    StoppedError,
    TinyLMMError,
    UserError,
    WaitingError,
)
from tinylmm.launch.ledger import Ledger, Run, RunOutcome
from tinylmm.launch.slurm_jobs import CloseRuns, MakeStage, Report, Terminal, close_run, outcome_of
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.planner import RunPlan, require_files, waits_for
from tinylmm.stop import stop_requested, watch_for_stop
from tinylmm.store.integrity import write_atomic
from tinylmm.store.queue import queued
from tinylmm.store.runs import CLOSING, RunRecord, read_all, recorded_run, run_lock, write_run
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

if TYPE_CHECKING:
    from submitit import SlurmExecutor

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Between two looks at the queue."""
CLOSING_MINUTES = 30


def submit(plans: Sequence[RunPlan], terminal: Terminal, report: Report) -> list[RunOutcome]:
    """Queue every stage that the plans ask for and the store lacks, follow the jobs, and return how each run ended.

    The jobs need nobody who follows them: Ctrl-C ends this command alone.

    Args:
        plans: the runs.
        terminal: makes what is written to, here and in the jobs.
        report: reports the runs when all jobs have ended. Both are functions of modules, as jobs call them.

    Raises:
        DataError: files are missing; nothing was queued.
        UserError: there is no SLURM here, or it refuses a job.
    """
    for plan in plans:
        require_files(plan)
    ledger = Ledger(plans)
    queue = _Queue(plans, ledger, terminal, report)
    try:
        jobs = queue.fill()
    except BaseException as failure:  # all or nothing, also where the user stops it
        queue.empty()
        stopped = StoppedError("stopped while its jobs were being queued; none is left")
        ledger.end(failure if isinstance(failure, TinyLMMError) else stopped)
        raise
    if not jobs:
        return [outcome_of(close_run(run.folder)) for run in ledger.runs]
    return _follow([run.folder for run in ledger.runs], jobs, terminal())


def _note(runs: Iterable[Run], digest: str, job: str) -> None:
    """Write into the record of each run which job makes a stage: at once, so that a run whose command dies has its jobs."""
    for run in runs:
        with run_lock(run.folder):
            record = recorded_run(run.folder)
            write_run(run.folder, replace(record, jobs={**record.jobs, digest: job}))


class _Queue:
    """Fills SLURM's queue with the stages of a grid."""

    def __init__(self, plans: Sequence[RunPlan], ledger: Ledger, terminal: Terminal, report: Report) -> None:
        self.plans, self.ledger, self.terminal, self.report = plans, ledger, terminal, report
        self.submitted: list[str] = []
        self.store = Store(plans[0].run.store)
        self.folder = self.store.layout.slurm.resolve()
        self.stages = list({stage.digest: stage for plan in plans for stage in plan.graph}.values())
        self.lane = 0
        self.token = f"tinylmm-{os.getpid()}-{int(time.time())}"

    def fill(self) -> dict[str, str]:
        """Queue what is to do; returns digest -> job, and CLOSING -> the last one."""
        jobs: dict[str, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", mode=0o666):  # of two commands that ask for one stage, one queues it
            todo = [stage for stage in self.stages if not self._is_settled(stage)]
            self.ledger.flush()  # now: from the first job on, jobs write into these records
            for stage in todo:
                jobs[stage.digest] = self._of_another(stage) or self._submit(stage, jobs)
                _note(self._users(stage), stage.digest, jobs[stage.digest])
        if jobs:
            runs = tuple(str(run.folder.resolve()) for run in self.ledger.runs)
            what = {"dependency": f"afterany:{':'.join(sorted(set(jobs.values())))}", "comment": "report"}
            executor = _executor(self.folder, self.plans[0].run.launch, ranks=False, minutes=CLOSING_MINUTES)
            executor.update_parameters(job_name=f"{self.token}-report", **what)
            jobs[CLOSING] = self._job(executor, CloseRuns(runs, self.terminal, self.report))
            _note(self.ledger.runs, CLOSING, jobs[CLOSING])
        return jobs

    def _is_settled(self, stage: Stage) -> bool:
        """Note that a stage is there, or waits for the user; False where it is to be made."""
        if self.store.is_complete(stage):
            self.ledger.mark(stage, "reused")
        elif said := waits_for(stage):
            self.ledger.give_up(stage, (), WaitingError(said))
        else:
            return False
        return True

    def empty(self) -> None:
        """Take back what was queued."""
        if self.submitted:
            subprocess.run(["scancel", *self.submitted], check=False)

    def _job(self, executor: SlurmExecutor, work: Callable[[], None]) -> str:
        """Submit a job.

        Raises:
            UserError: SLURM refuses it.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with redirect_stderr(io.StringIO()):  # submitit repeats there what sbatch says, which is in the error too
                job = str(executor.submit(work).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            said = str(error).strip().splitlines()[-1]
            raise UserError(
                f"launch.slurm: SLURM refuses a job ({said}); nothing was queued. Correct launch.slurm, launch.nodes or "
                "launch.nproc; `sinfo` shows what this cluster has."
            ) from error
        self.submitted.append(job)
        return job

    def _of_another(self, stage: Stage) -> str | None:
        """The job of another command that makes this stage, or that will."""
        path = self.folder / stage.key
        if not path.exists():
            return None
        job = path.read_text(encoding="utf-8").strip()
        return job if queued([job]) else None

    def _users(self, stage: Stage) -> list[Run]:
        return [run for run in self.ledger.runs if stage.digest in run.rows]

    def _submit(self, stage: Stage, jobs: dict[str, str]) -> str:
        users = self._users(stage)
        launch = users[0].plan.run.launch
        kind = KINDS[stage.kind]
        executor = _executor(self.folder, launch, kind.uses_ranks)
        parents = sorted({jobs[parent] for parent in stage.parents.values() if parent in jobs})
        assert launch.slurm is not None
        waits = [f"afterok:{':'.join(parents)}"] if parents else []
        if len(self.stages) > launch.slurm.limit:  # so many names, each of one job at a time
            waits.append("singleton")
            self.lane = (self.lane + 1) % launch.slurm.limit
        executor.update_parameters(
            job_name=f"{self.token}-{self.lane if 'singleton' in waits else len(jobs)}",
            comment=f"{stage.kind} {stage.name}",
            **({"dependency": ",".join(waits)} if waits else {}),
        )
        made = MakeStage(
            tuple(str(run.folder.resolve()) for run in users), stage.digest, launch.slurm.requeues, self.terminal
        )
        job = self._job(executor, made)
        write_atomic(self.folder / stage.key, job)
        return job


def _executor(folder: Path, launch: LaunchSpec, ranks: bool, minutes: int | None = None) -> SlurmExecutor:
    """What submits a job.

    Args:
        folder: for its log and its pickled work.
        ranks: whether the job is on all machines and GPUs of the launch.
        minutes: its time limit; by default the launch's.

    Raises:
        UserError: submitit or SLURM is missing.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise UserError("launch=slurm needs submitit. Install it: pip install 'tinylmm[slurm]'.") from error
    if missing := [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]:
        raise UserError(
            f"launch=slurm: there is no {' and no '.join(missing)} here. Give the command on a machine that submits to SLURM, "
            "or choose another launch."
        )
    asked = launch.slurm
    assert asked is not None
    executor = SlurmExecutor(folder / "%j", max_num_timeout=asked.requeues)
    wanted: dict[str, Any] = {
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "cpus_per_task": asked.cpus,
        "mem": None if asked.mem_gb is None else f"{asked.mem_gb}GB",
        "gpus_per_node": launch.nproc if ranks and launch.device != "cpu" else None,
        "setup": list(asked.setup) or None,
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={asked.cpus}"] if asked.cpus else [])],
    }
    options = {"requeue": True, "kill-on-invalid-dep": "yes", **asked.options}
    executor.update_parameters(
        time=minutes or max(1, round(asked.hours * 60)),
        nodes=launch.nodes if ranks else 1,
        ntasks_per_node=1,
        signal_delay_s=round(asked.warn_minutes * 60),
        stderr_to_stdout=True,
        additional_parameters=options,
        **{name: value for name, value in wanted.items() if value is not None},
    )
    return executor


# ------------------------------------------------------------------------------------------------ who follows them


def _follow(folders: Sequence[Path], jobs: dict[str, str], console: Console) -> list[RunOutcome]:
    """Say what becomes of the jobs until the last one has ended.

    Raises:
        StoppedError: this command was stopped; the jobs go on.
    """
    shown: dict[str, str] = {}
    with watch_for_stop():
        console.print(
            f"{len(jobs) - 1} jobs are queued, and one that reports. They go on without this command; "
            f"tinylmm runs --cancel {folders[0].name} ends them.",
            highlight=False,
            soft_wrap=True,
        )
        while True:
            states = queued(jobs.values())
            records = [recorded_run(folder) for folder in folders]
            rows = {row.digest: row for record in records for row in record.stages if row.digest in jobs}
            for digest, row in rows.items():
                job = jobs[digest]
                state = row.status if row.finished or row.status == "failed" or not states else states.get(job, "ended")
                if state not in (shown.get(digest), "ended"):
                    shown[digest] = state
                    console.print(f"  {row.kind} {row.name}  {state.lower()}  (job {job})", highlight=False)
            if states is not None and jobs[CLOSING] not in states:
                return list(map(outcome_of, read_all(folders)))
            _sleep(f"jobs {', '.join(sorted(set(jobs.values()), key=int))}")


def _sleep(what: str) -> None:
    end = time.monotonic() + POLL_SECONDS
    while time.monotonic() < end:
        if stop_requested():
            raise StoppedError(f"{what} go on without this command; `tinylmm runs` says how they stand")
        time.sleep(0.1)


def cancel(record: RunRecord) -> list[str]:
    """End a run's jobs, but for those that another run waits for; returns what was ended. They save what they have.

    Raises:
        UserError: it has none.
    """
    from tinylmm.store.runs import read_runs

    alive = queued(record.jobs.values()) if record.jobs else {}
    if not alive:
        raise UserError(f"run {record.name} has no jobs that wait or run.")
    others = [run for run in read_runs(record.folder.parents[1]) if run.status == "running" and run.name != record.name]
    kept = {job for run in others for job in run.jobs.values()}
    ended = sorted(set(alive) - kept, key=int)
    if ended:
        subprocess.run(["scancel", *ended], check=True)
    close_run(record.folder)
    return ended
