"""Runs a stage on several ranks under torchrun; DeepSpeed, where asked for, starts inside the ranks.

Of several machines (`launch.nodes`) this is the one that begins the stage; `launch/nodes.py` has the others.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StageFailedError, StoppedError, TinyLMMError, UserError
from tinylmm.launch.nodes import MEETING_FILE, ask_to_stop, call_others, start_agent
from tinylmm.launch.results import ending, last_lines, read_result
from tinylmm.launch.starting import Started
from tinylmm.launch.worker import FAILED_RANKS, RANK_RESULTS, RESULT_FILE, WORDS_FOLDER, FailedRank
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE
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
    """See `LaunchBackend`: a torchrun of this machine (`launch/agent.py`) for each stage, a fork of the starter."""

    def __init__(self, launch: LaunchSpec) -> None:
        self._launch = launch
        self._process: Started | None = None
        self._asked = False
        self._log_start = 0
        """Where this try's part of the log begins."""

    def start(self, job: StageJob[Any]) -> None:
        """Start torchrun on the job."""
        self._job = job
        for stale in [STOP_FILE, RESULT_FILE, MEETING_FILE, *(path.name for path in job.folder.glob(RANK_RESULTS))]:
            (job.folder / stale).unlink(missing_ok=True)
        for folder in (WORDS_FOLDER, FAILED_RANKS):
            shutil.rmtree(job.folder / folder, ignore_errors=True)
        path = job.folder / LOG_FILE
        self._log_start = path.stat().st_size if path.exists() else 0
        if self._launch.nodes == 1:
            self._process = self._spawn(job.folder, ["--standalone"])
        else:
            self._process = self._spawn(job.folder, call_others(job, self._launch).words())

    def _spawn(self, folder: Path, meeting: list[str]) -> Started:
        return start_agent(folder, self._launch, meeting)

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
        said = self._process.starter_death()
        if said is not None and not (self._job.folder / RESULT_FILE).exists():
            raise StageFailedError(said)
        assert self._process.returncode is not None
        return _outcome(self._job, self._process.returncode, self._log_start)

    def stop(self, now: bool = False) -> None:
        """Ask the ranks to save and stop, by a file and by a signal that wakes them; or kill them."""
        if self._process is None or self._process.poll() is not None:
            return
        if now:
            self._process.kill()
        elif not self._asked:
            self._asked = True
            ask_to_stop(self._job.folder, self._process)


def _has_stopped(job: StageJob[Any]) -> bool:
    """Whether a rank ended a while ago because it was asked to; one that then still waits for it cannot know that."""
    for path in [job.folder / RESULT_FILE, *job.folder.glob(RANK_RESULTS)]:
        if path.exists() and time.time() - path.stat().st_mtime > LINGER_SECONDS:
            return read_result(path).get("type") == StoppedError.__name__
    return False


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
        words = Path(first.words)
        if words.exists() and (last := last_lines(words)):
            said += f" Its last lines:\n{last}"
    others = [_of_another(one, errors.get(one.rank)) for one in failed if one is not first]
    return "\n  ".join([said, *filter(None, others)])


def _failed_ranks(folder: Path) -> list[FailedRank]:
    return [FailedRank(**one) for path in sorted(folder.glob("*.json")) for one in json.loads(path.read_text("utf-8"))]


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
