"""Runs a stage on several ranks of this machine under torchrun; DeepSpeed, where asked for, starts inside the ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

from tinylmm.config.cores import usable_cores
from tinylmm.config.spec import LaunchSpec
from tinylmm.errors import StageFailedError, StoppedError, TinyLMMError, UserError
from tinylmm.launch.results import ending, last_lines, read_result
from tinylmm.launch.worker import FAILED_RANKS, RANK_RESULTS, RESULT_FILE, WORDS_FOLDER, FailedRank, has_gpu_driver
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE, held_back
from tinylmm.store.disk import has_no_room
from tinylmm.store.layout import LOG_FILE

log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0
"""Once a rank has stopped as asked, the others have so long to end too."""


class RankError(TinyLMMError):
    """An error of our family raised in a rank, carried to the parent with its message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Backend:
    """See `LaunchBackend`: a torchrun of this machine (`launch/agent.py`), in a session of its own."""

    def __init__(self, launch: LaunchSpec) -> None:
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False
        self._log_start = 0
        """Where this try's part of the log begins."""

    def start(self, job: StageJob[Any]) -> None:
        """Start torchrun on the job."""
        self._job = job
        _refuse_more_ranks_than_gpus(self._launch)
        for stale in [STOP_FILE, RESULT_FILE, FAILED_RANKS, *(path.name for path in job.folder.glob(RANK_RESULTS))]:
            (job.folder / stale).unlink(missing_ok=True)
        shutil.rmtree(job.folder / WORDS_FOLDER, ignore_errors=True)
        words = ["--standalone", f"--nproc-per-node={self._launch.nproc}"]
        words += [f"--log-dir={job.folder / WORDS_FOLDER}", "--tee=2", "--module", "tinylmm.launch.worker"]
        with (job.folder / LOG_FILE).open("ab") as output, held_back():
            self._log_start = output.tell()
            self._process = self._spawn([str(os.getpid()), str(job.folder), *words, str(job.folder)], output)

    def _spawn(self, words: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tinylmm.launch.agent", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(self._launch),
            start_new_session=True,  # Ctrl-C reaches this parent alone, which then asks the ranks to save
        )

    def poll(self) -> dict[str, Any] | None:
        """Return the summary that rank 0 left, None while ranks work.

        Raises:
            StoppedError: ranks saved and stopped because they were asked to.
            RankError, UserError: a rank raised an error of ours; message and exit code are its own.
            StageFailedError: a rank died or hung; names the rank, with its last words.
        """
        assert self._process is not None, "poll() comes after start()"
        if self._process.poll() is None:
            if not (self._asked and _has_stopped(self._job)):
                return None
            self.stop(now=True)
        return _outcome(self._job, self._process.returncode, self._log_start)

    def stop(self, now: bool = False) -> None:
        """Ask the ranks to save and stop, by a file and by a signal that wakes them; or kill them."""
        if self._process is None or self._process.poll() is not None:
            return
        if now:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        elif not self._asked:
            self._asked = True
            (self._job.folder / STOP_FILE).touch()
            with contextlib.suppress(psutil.NoSuchProcess):  # they are ending as it is
                for rank in psutil.Process(self._process.pid).children():
                    rank.send_signal(signal.SIGTERM)


def _has_stopped(job: StageJob[Any]) -> bool:
    """Whether a rank ended a while ago because it was asked to; one that then still waits for it cannot know that."""
    for path in [job.folder / RESULT_FILE, *job.folder.glob(RANK_RESULTS)]:
        if path.exists() and time.time() - path.stat().st_mtime > LINGER_SECONDS:
            return read_result(path).get("type") == StoppedError.__name__
    return False


def _refuse_more_ranks_than_gpus(launch: LaunchSpec) -> None:
    """Say before anything starts what NCCL would say after half a minute as an invalid device ordinal.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    if launch.device == "cpu" or not has_gpu_driver():
        return
    import torch

    found = torch.cuda.device_count()
    if 0 < found < launch.nproc:
        raise UserError(
            f"launch.nproc is {launch.nproc}, but only {found} CUDA GPUs can be seen, and each rank needs its own. "
            f"Set launch.nproc={found}, or launch.device=cpu."
        )


def _environment(launch: LaunchSpec) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // launch.nproc)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if launch.device == "cpu" or not has_gpu_driver():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _outcome(job: StageJob[Any], code: int, begin: int = 0) -> dict[str, Any]:
    """What the ranks left: the summary, or the error of the rank that is to blame. `begin` is where this try's log starts."""
    paths = [job.folder / RESULT_FILE, *sorted(job.folder.glob(RANK_RESULTS))]
    results = [read_result(path) for path in paths if path.exists()]
    errors = [result for result in results if "error" in result]
    # A rank's own fault comes before what it made of the others (closed connections, timeouts).
    for error in errors:
        if error["type"] == StoppedError.__name__:
            raise StoppedError(error["error"])
        if error["exit_code"] == UserError.exit_code:
            raise UserError(error["error"])
        if error["type"] != "traceback":
            raise RankError(f"rank {error['rank']}: {error['error']}", error["exit_code"])
    if code == 0 and not errors and results:
        return dict(results[0]["summary"])
    said = _blame(job, {error["rank"]: error["error"] for error in errors}, code, begin)
    if has_no_room(job.folder):  # a rank that cannot write cannot say so
        said = f"the disk of {job.folder} is full; free some space and give the same command again.\n{said}"
    raise StageFailedError(said)


def _blame(job: StageJob[Any], errors: dict[int, str], code: int, begin: int) -> str:
    """Say which rank failed first, in its own words, and what became of the others.

    Args:
        errors: rank -> the traceback that it left.
        code: of torchrun.
        begin: where this try's part of the log starts.
    """
    log_file = job.folder / LOG_FILE
    failed = _failed_ranks(job.folder / FAILED_RANKS)
    first = _first_failure(failed)
    if first is None:
        if errors:
            rank, error = min(errors.items())
            return f"rank {rank} failed:\n{error}"
        last = last_lines(log_file, begin)
        return f"torchrun ended with exit code {code} and no rank said why. Last lines of {log_file}:\n{last}"
    if first.rank in errors:
        said = f"rank {first.rank} failed:\n{errors[first.rank]}"
    else:
        said = f"rank {first.rank} ended with {ending(first.exit_code)}. The log is {log_file}."
        words = next(job.folder.glob(f"{WORDS_FOLDER}/*/attempt_*/{first.rank}/stderr.log"), None)
        if words is not None and (last := last_lines(words)):
            said += f" Its last lines:\n{last}"
    others = [_of_another(one, errors.get(one.rank)) for one in failed if one is not first]
    return "\n  ".join([said, *filter(None, others)])


def _failed_ranks(path: Path) -> list[FailedRank]:
    if not path.exists():
        return []
    return [FailedRank(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


def _first_failure(failed: list[FailedRank]) -> FailedRank | None:
    """The rank that brought the others down. Of those seen in the same second, one that a signal ended: the others then
    failed over its silence, or were ended by the agent.
    """
    earliest = [one for one in failed if one.time == min(other.time for other in failed)]
    killed = [one for one in earliest if one.exit_code < 0 and one.exit_code != -signal.SIGTERM]
    return next(iter(killed or earliest), None)


def _of_another(one: FailedRank, error: str | None) -> str | None:
    if error is not None:
        return f"rank {one.rank} then said: {error.strip().splitlines()[-1]}"
    if one.exit_code == -signal.SIGKILL:
        return f"rank {one.rank} did not end by itself then and was killed"
    return None
