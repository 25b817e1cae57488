"""Work of a stage on all cores: pieces go out to processes, what became of them comes back in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tinylmm.errors import StageFailedError, StoppedError
from tinylmm.stop import belong_to, stop_requested

Piece = TypeVar("Piece")
Result = TypeVar("Result")

AHEAD = 2
"""Pieces a process has waiting: it never waits for the next one, and no more than these are in memory."""
POLL_SECONDS = 0.2

_work: Callable[[Any], Any]
"""In a process of the pool: what it does with a piece."""


def in_order(work: Callable[[Piece], Result], pieces: Iterator[Piece], processes: int, doing: str) -> Iterator[Result]:
    """Yield `work(piece)` of every piece, in their order.

    Args:
        work: picklable; travels to each process once.
        processes: with fewer than 2, the work is done here.
        doing: "preparing samples", for the sentence of a stop.

    Raises:
        StoppedError: a stop was asked for.
        StageFailedError: a process died.
    """
    if processes < 2:
        for piece in pieces:
            heed(doing)
            yield work(piece)
        return
    with _pool(work, processes) as pool:
        waiting: deque[Future[Result]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(_do, piece))
            while len(waiting) > AHEAD * processes:
                yield _result(waiting.popleft(), doing)
        while waiting:
            yield _result(waiting.popleft(), doing)


@contextmanager
def _pool(work: Callable[[Piece], Result], processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block: at once where it is left early, since nobody waits for what they do."""
    # spawn: a fork would copy the locks of torch's and the tokenizer's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _start, (work, os.getpid()))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise


def _start(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    belong_to(parent)
    _work = work


def _do(piece: Any) -> Any:
    return _work(piece)


def _result(future: Future[Result], doing: str) -> Result:
    """Wait for a piece, and for a stop."""
    while not future.done():
        heed(doing)
        wait([future], POLL_SECONDS)
    heed(doing)
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise StageFailedError(
            f"a process died while {doing} (out of memory, or killed). Give it more memory, or fewer processes "
            "(launch.num_workers); the same command continues from there."
        ) from error


def heed(doing: str) -> None:
    """Go on, unless a stop was asked for.

    Args:
        doing: what goes on, for the sentence.

    Raises:
        StoppedError: it was.
    """
    if stop_requested():
        raise StoppedError(f"stopped while {doing}; the same command continues from there")
