"""Runs a stage in a process of its own on this machine: what `local` is where stages run side by side."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StageFailedError, TinyLMMError
from tinylmm.launch.results import ending, failed_with, last_lines, read_result, tail
from tinylmm.launch.worker import RESULT_FILE, has_gpu_driver
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE, held_back
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
        self._starter = _starter()
        self._starter.start(str(job.folder))

    def poll(self) -> dict[str, Any] | None:
        """Return the summary that the worker left, None while it works.

        Raises:
            TinyLMMError: an error of ours, as the worker raised it.
            StageFailedError: it failed otherwise, or died.
        """
        code = self._starter.ended(str(self._job.folder))
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
        if self._over or not hasattr(self, "_starter"):
            return
        folder = str(self._job.folder)
        if now:
            self._over = True
            self._starter.kill(folder)
        elif not self._asked:
            self._asked = True
            (self._job.folder / STOP_FILE).touch()
            self._starter.signal(folder, signal.SIGTERM)

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
        if not self._starter.alive:
            return f"the process that starts stages ended with {ending(code)}. Its last lines:\n{self._starter.said()}"
        path = folder / LOG_FILE
        last = f" Its last lines:\n{last_lines(path, self._log_start)}" if path.exists() else ""
        said = f"the process of {self._job.kind} {self._job.name} ended with {ending(code)}. The log is {path}.{last}"
        if has_no_room(folder):  # what cannot write cannot say so
            return f"the disk of {folder} is full; free some space and give the same command again.\n{said}"
        return said


class _Starter:
    """The starter process, and what it says of the workers that it forked."""

    def __init__(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        how = "anew" if has_gpu_driver() else "fork"
        with held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinylmm.launch.starter", str(os.getpid()), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                start_new_session=True,  # Ctrl-C reaches this parent alone, which then asks the workers to save
            )
        self._rest = b""
        self._pids: dict[str, int] = {}
        """Folder of a stage -> its worker, once the starter, which may still be loading, has said so."""
        self._codes: dict[int, int] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        """Signals for workers whose process id is not known yet."""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, folder: str) -> None:
        self._pids.pop(folder, None)
        self._waiting[folder] = []
        self._order({"start": folder, "folder": str(Path.cwd()), "environment": dict(os.environ)})

    def ended(self, folder: str) -> int | None:
        """The exit code of a stage's worker, or None while it works; that of the starter where that has died."""
        self._listen(0.0)
        pid = self._pids.get(folder, 0)
        if pid in self._codes:
            del self._pids[folder]
            return self._codes.pop(pid)
        return None if self.alive else self._process.returncode

    def said(self) -> str:
        """The starter's last words."""
        self._words.seek(0)
        return tail(self._words.read())

    def signal(self, folder: str, number: int, everyone: bool = False) -> None:
        order = {"signal": int(number), "all": everyone}
        if folder in self._pids:
            self._order(order | {"pid": self._pids[folder]})
        else:
            self._waiting[folder].append(order)

    def kill(self, folder: str) -> None:
        """End a stage's worker and its helpers, and wait until it has ended."""
        self.signal(folder, signal.SIGKILL, everyone=True)
        while self.ended(folder) is None:
            self._listen(0.1)

    def _order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            log.warning("the process that starts stages has ended")  # `ended` says so to whoever waits for one

    def _listen(self, seconds: float) -> None:
        """Take in what the starter has said, waiting for so long."""
        assert self._process.stdout is not None
        answers = self._process.stdout.fileno()
        while select.select([answers], [], [], seconds)[0]:
            found = os.read(answers, 1 << 16)
            if not found:
                self._process.wait()
                return
            *lines, self._rest = (self._rest + found).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            seconds = 0.0

    def _take(self, answer: dict[str, Any]) -> None:
        if "started" in answer:
            self._pids[answer["started"]] = answer["pid"]
            for order in self._waiting.pop(answer["started"]):
                self._order(order | {"pid": answer["pid"]})
        else:
            self._codes[answer["ended"]] = answer["code"]


_running: _Starter | None = None


def _starter() -> _Starter:
    """The one starter of this process, made when it is first needed; it ends with this process."""
    global _running
    if _running is None or not _running.alive:
        _running = _Starter()
    return _running
