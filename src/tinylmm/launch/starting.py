"""The command's side of the starter (`launch/starter.py`): processes for stages, forked from one that has all loaded."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tinylmm.launch.results import ending, tail
from tinylmm.stop import held_back

log = logging.getLogger(__name__)

How = Literal["fork", "anew", "try"]
Whom = Literal["it", "children", "session"]


class Started:
    """The process of one stage: what is needed here of `subprocess.Popen`.

    Args:
        starter: who forks it.
        folder: the stage's work folder; whatever the process writes goes to the log there.
        environment: all its variables.
        torchrun: words for torchrun, where the process is to be that (`launch/agent.py`) and not the stage's worker.
    """

    def __init__(
        self, starter: _Starter, folder: Path, environment: Mapping[str, str], torchrun: list[str] | None
    ) -> None:
        self.returncode: int | None = None
        self._starter, self._folder = starter, str(folder)
        starter.start(self._folder, environment, torchrun)

    def poll(self) -> int | None:
        """Its exit code, None while it works; that of the starter where that has died."""
        if self.returncode is None:
            self.returncode = self._starter.ended(self._folder)
        return self.returncode

    def signal_it(self, number: int) -> None:
        """Send it a signal, once it has begun."""
        self._starter.signal(self._folder, number, "it")

    def signal_children(self, number: int) -> None:
        """Send a signal to those that it has started: torchrun's ranks."""
        self._starter.signal(self._folder, number, "children")

    def kill(self) -> None:
        """End it and its helpers, and wait until it has ended."""
        if self.poll() is None:
            self._starter.kill(self._folder)
            self.returncode = -signal.SIGKILL

    def starter_death(self) -> str | None:
        """How the starter died, where it has."""
        return None if self._starter.alive else self._starter.death()


class _Starter:
    """The starter process, and what it says of the processes that it forked."""

    def __init__(self, how: How, environment: Mapping[str, str]) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        with held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinylmm.launch.starter", str(os.getpid()), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches this parent alone, which then asks the workers to save
            )
        self._rest = b""
        self._pids: dict[str, int] = {}
        """Folder of a stage -> its process, once the starter, which may still be loading, has said so."""
        self._codes: dict[int, int] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        """Signals for processes whose id is not known yet, by folder."""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether a stage is under way."""
        return bool(self._pids or self._waiting)

    def start(self, folder: str, environment: Mapping[str, str], torchrun: list[str] | None) -> None:
        self._pids.pop(folder, None)
        self._waiting[folder] = []
        order = {"start": folder, "folder": str(Path.cwd()), "environment": dict(environment)}
        self._order(order if torchrun is None else order | {"torchrun": torchrun})

    def ended(self, folder: str) -> int | None:
        """The exit code of a stage's process, or None while it works; that of the starter where that has died."""
        self._listen(0.0)
        pid = self._pids.get(folder, 0)
        if pid in self._codes:
            del self._pids[folder]
            return self._codes.pop(pid)
        return None if self.alive else self._process.returncode

    def death(self) -> str:
        """How it died, with its last words."""
        self._words.seek(0)
        how, last = ending(self._process.returncode), tail(self._words.read())
        return f"the process that starts stages ended with {how}. Its last lines:\n{last}"

    def signal(self, folder: str, number: int, whom: Whom) -> None:
        order = {"signal": int(number), "whom": whom}
        if folder in self._pids:
            self._order(order | {"pid": self._pids[folder]})
        elif folder in self._waiting:
            self._waiting[folder].append(order)

    def kill(self, folder: str) -> None:
        """End a stage's process and its helpers, and wait until it has ended."""
        if not self._pids:  # it may be loading for long, and nothing else needs it
            self._process.kill()
            self._process.wait()
            return
        self.signal(folder, signal.SIGKILL, "session")
        while self.ended(folder) is None:
            self._listen(0.1)

    def dismiss(self) -> None:
        """End it, where nothing is under way."""
        self._process.kill()
        self._process.wait()

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


_running: list[tuple[How, dict[str, str] | None, _Starter]] = []
"""How each starter of this process makes processes, and what variables it was loaded under, None where that is all the same."""


def start_worker(folder: Path, how: How) -> Started:
    """Start the worker of a stage that takes one process."""
    return Started(_starter(how, None), folder, os.environ, None)


def start_torchrun(folder: Path, how: How, environment: dict[str, str], words: list[str]) -> Started:
    """Start torchrun (`launch/agent.py`) on the job in `folder`.

    Args:
        environment: of its ranks, and of the libraries that they find loaded.
        words: for torchrun.
    """
    return Started(_starter(how, environment), folder, environment, words)


def _starter(how: How, environment: dict[str, str] | None) -> _Starter:
    """The one that makes processes so, loaded under these variables; made when it is first needed, and ended with this process.

    Of others that were loaded under variables of their own none stays that has nothing to do.
    """
    for one in list(_running):
        if not one[2].alive:
            _running.remove(one)
        elif one[:2] == (how, environment):
            return one[2]
        elif None not in (environment, one[1]) and not one[2].busy:
            one[2].dismiss()
            _running.remove(one)
    _running.append((how, environment, _Starter(how, os.environ if environment is None else environment)))
    return _running[-1][2]
