"""The thread that computes: questions come in from the server's event loop, tokens go back to it."""

from __future__ import annotations

import logging
import queue
import threading

from tinylmm.generation.continuous import ContinuousEngine
from tinylmm.generation.questions import Question

log = logging.getLogger(__name__)


class ClosedError(Exception):
    """The server has stopped before an answer was complete."""


class EngineWorker:
    """Runs an engine in a thread of its own, which alone touches it."""

    def __init__(self, engine: ContinuousEngine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it computes, or waits for something to compute."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask(self, question: Question) -> None:
        """Have a question answered; what comes back is told to its `emit`, in the engine's thread."""
        self._inbox.put(question)

    def close(self) -> None:
        """End after the token at hand; questions not answered by then get a ClosedError."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take():
            try:
                self.engine.tick()
            except Exception as error:  # nobody may wait forever for an answer that will not come
                log.exception("the engine failed; the answers it was at are lost")
                self.engine.close(error)
        self.engine.close(ClosedError("the server is stopping"))

    def _take(self) -> bool:
        """Take in what waits, and wait where there is nothing to do; False once the server closes."""
        while True:
            try:
                question = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if question is None:
                return False
            self.engine.ask(question)
