"""Asking a run to stop: SIGTERM, SIGINT, or a file that the parent leaves for torchrun's ranks.

Long loops ask `stop_requested()` at safe points, save what they have and raise `StoppedError` (exit code 75). A second
signal gives up at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

STOP_FILE = "stop-requested"


class StopSignal:
    """Remembers that somebody asked for a stop.

    Args:
        folder: a stage's work folder; a file `stop-requested` in it counts as a request.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._received = False
        self.folder = folder

    def __call__(self) -> bool:
        return self._received or (self.folder is not None and (self.folder / STOP_FILE).exists())

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first signal, give up on the second."""
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        log.warning("%s received: saving and stopping (once more to give up at once)", signal.Signals(number).name)


_current = StopSignal()


def stop_requested() -> bool:
    """Whether the work at hand shall save and stop at its next safe point."""
    return _current()


@contextmanager
def watch_for_stop(folder: Path | None = None) -> Iterator[StopSignal]:
    """Turn SIGTERM and SIGINT into a request that `stop_requested` reports, until the block ends.

    Signal handlers belong to a process's main thread; elsewhere only the file is watched.
    """
    global _current
    previous, _current = _current, StopSignal(folder)
    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, _current.receive) for number in watched}
    try:
        yield _current
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if _current._received:  # an outer watcher must not lose the request
            previous._received = True
        _current = previous
