"""Asking a run to stop: a signal, or the file that a parent leaves for torchrun's ranks.

Long loops ask `stop_requested()` at safe points, save what they have and raise `StoppedError` (exit code 75). What does not
ask within GRACE_SECONDS is interrupted where it is: all that a stage has on disk stays good, as after kill -9. Training
takes its time instead (`uninterrupted`), as it has something to save. A later signal gives up at once.

Here too: what makes a helper process part of the one that started it (`belong_to`), so that a run lives or dies as a whole.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

STOP_FILE = "stop-requested"
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""What schedulers, terminals and people end work with. The default of each is to end the process on the spot."""
REPEAT_SECONDS = 3.0
"""A scheduler that signals every process, and each process that passes it on, make one request of it, not two."""
GRACE_SECONDS = 3.0
"""What has not asked for so long after a signal is interrupted."""
_PR_SET_PDEATHSIG = 1


class TerminatedError(BaseException):
    """A signal other than Ctrl-C ends a command that has nothing to save. Nothing but the command's end catches it."""


class StopSignal:
    """Remembers that somebody asked for a stop.

    Args:
        folder: for a rank, the stage's work folder: a file `stop-requested` in it counts as a request, and a repeated signal
            never means to give up, since the rank's parent decides that.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.since: float | None = None
        """When the first request came (monotonic seconds)."""
        self.number: int | None = None
        """The signal that it came by."""
        self.asked = False
        """Whether somebody has learnt of the request, and so acts on it."""
        self.uninterrupted = False
        self._process = os.getpid()

    def __call__(self) -> bool:
        requested = self.since is not None or (self.folder is not None and (self.folder / STOP_FILE).exists())
        self.asked = self.asked or requested
        return requested

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first signal, give up on a later one."""
        if os.getpid() != self._process:  # in a helper that was forked a moment ago: its parent has the signal too
            return
        if self.since is None:
            self.number = number
            self.note()
            log.warning("%s received: saving and stopping (once more to give up at once)", signal.Signals(number).name)
        elif self.folder is None and time.monotonic() - self.since > REPEAT_SECONDS:
            raise KeyboardInterrupt

    def note(self) -> None:
        """Take a request, and have the work interrupted if it does not ask."""
        self.since = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Signal handler of the timer."""
        if os.getpid() == self._process and not self.asked and not self.uninterrupted:
            raise KeyboardInterrupt


_NOBODY = StopSignal()
"""Stands for the watcher where there is none."""
_current = _NOBODY
_claim: Callable[[], None] | None = None


def stop_requested() -> bool:
    """Whether the work at hand shall save and stop at its next safe point.

    Raises:
        ClaimLostError: another process has taken the stage over; there is nothing to save any more.
    """
    require_claim()
    return _current()


def require_claim() -> None:
    """Call before each write of a stage: its folder may have become another's while this process was silent.

    Raises:
        ClaimLostError: it has.
    """
    if _claim is not None:
        _claim()


@contextmanager
def claimed(require: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `require_claim` calls `require`, which raises ClaimLostError."""
    global _claim
    previous, _claim = _claim, require
    try:
        yield
    finally:
        _claim = previous


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While the block runs, a request waits until somebody asks for it, however long that takes."""
    watched, before = _current, _current.uninterrupted
    watched.uninterrupted = True
    try:
        yield
    finally:
        watched.uninterrupted = before
        if watched.since is not None and not watched.asked and not before:
            watched.note()


@contextmanager
def watch_for_stop(folder: Path | None = None) -> Iterator[StopSignal]:
    """Turn STOP_SIGNALS into a request that `stop_requested` reports, until the block ends.

    A signal that whoever started this process had ignored (`nohup`) stays so, but for ranks, whose parent answers to that.
    Signal handlers belong to a process's main thread; elsewhere only the file is watched.
    """
    global _current
    previous, _current = _current, StopSignal(folder)
    handlers = dict.fromkeys(_heeded(rank=folder is not None), _current.receive)
    if handlers:
        handlers[signal.SIGALRM] = _current.interrupt
    try:
        with _handled(handlers):
            if handlers and _current():  # asked for before this rank could hear of it
                _current.asked = False
                _current.note()
            yield _current
    finally:
        if _current.since is not None and previous.since is None and previous is not _NOBODY:
            previous.since, previous.number = _current.since, _current.number  # an outer watcher must not lose it
        _current = previous


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let STOP_SIGNALS end the block with an exception, so that it is left in order. Ctrl-C already does that.

    Raises:
        TerminatedError: one came.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise TerminatedError(signal.Signals(number).name)

    with _handled({number: end for number in _heeded(rank=False) if number != signal.SIGINT}):
        yield


def _heeded(rank: bool) -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOP_SIGNALS if rank or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        if signal.SIGALRM in handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def belong_to(parent: int) -> None:
    """Make this process a helper of the one that started it: killed with it by the kernel (Linux), and deaf to signals.

    A scheduler and a terminal signal every process of a run. The one at the top answers, and tells its helpers.

    Args:
        parent: process id of whoever started this; if that is gone already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def held_back() -> Iterator[None]:
    """Keep STOP_SIGNALS waiting while the block starts a process, which has them held back too until it can take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
