"""Runs a stage in a process of its own on this machine: what `local` is where stages run side by side."""

from __future__ import annotations

import logging
import signal
from importlib import import_module
from typing import Any

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StageFailedError, TinyLMMError
from tinylmm.launch.results import ending, failed_with, last_lines, read_result
from tinylmm.launch.starting import start_worker
from tinylmm.launch.worker import RESULT_FILE, has_gpu_driver
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE
from tinylmm.store.disk import has_no_room
from tinylmm.store.layout import LOG_FILE

log = logging.getLogger(__name__)


class Backend:
    """See `LaunchBackend`: a fork of the starter (`launch/starter.py`), in a session of its own."""

    def __init__(self, launch: LaunchSpec) -> None:
        self._asked = False
        self._over = False
        self._log_start = 0
        """Where this try's part of the log begins."""

    def start(self, job: StageJob[Any]) -> None:
        """Have the starter fork a worker for the job."""
        self._job = job
        for stale in (STOP_FILE, RESULT_FILE):
            (job.folder / stale).unlink(missing_ok=True)
        path = job.folder / LOG_FILE
        self._log_start = path.stat().st_size if path.exists() else 0
        self._process = start_worker(job.folder, "anew" if has_gpu_driver() else "fork")

    def poll(self) -> dict[str, Any] | None:
        """Return the summary that the worker left, None while it works.

        Raises:
            TinyLMMError: an error of ours, as the worker raised it.
            StageFailedError: it failed otherwise, or died.
        """
        code = self._process.poll()
        if code is None:
            return None
        self._over = True
        path = self._job.folder / RESULT_FILE
        if not path.exists():
            raise StageFailedError(self._death(code))
        result = read_result(path)
        if "summary" in result:
            return dict(result["summary"])
        raise self._raised(result)

    def stop(self, now: bool = False) -> None:
        """Ask the worker to save and stop, by a file and by a signal that wakes it; or kill it with its helpers."""
        if self._over or not hasattr(self, "_process"):
            return
        if now:
            self._over = True
            self._process.kill()
        elif not self._asked:
            self._asked = True
            (self._job.folder / STOP_FILE).touch()
            self._process.signal_it(signal.SIGTERM)

    def _raised(self, result: dict[str, Any]) -> TinyLMMError:
        """The worker's error as one of this process."""
        kind = getattr(import_module(TinyLMMError.__module__), result["type"], None)
        if isinstance(kind, type) and issubclass(kind, TinyLMMError) and "__init__" not in vars(kind):
            return kind(result["error"])
        if result["type"] != "traceback":
            failure = TinyLMMError(result["error"])
            failure.exit_code = result["exit_code"]
            return failure
        words, job = result["error"].strip(), self._job
        bug = StageFailedError(failed_with(job.kind, job.name, words.splitlines()[-1], job.folder))
        bug.add_note(words)  # for error.txt: the traceback is no sentence for the command's end
        return bug

    def _death(self, code: int) -> str:
        """What to say of a worker that died without a word of ours."""
        folder = self._job.folder
        if (said := self._process.starter_death()) is not None:
            return said
        path = folder / LOG_FILE
        last = f" Its last lines:\n{last_lines(path, self._log_start)}" if path.exists() else ""
        said = f"the process of {self._job.kind} {self._job.name} ended with {ending(code)}. The log is {path}.{last}"
        if has_no_room(folder):  # what cannot write cannot say so
            return f"the disk of {folder} is full; free some space and give the same command again.\n{said}"
        return said
