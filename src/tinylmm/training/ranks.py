"""Small questions to the process group that also have an answer without one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
from torch import distributed

WAIT_SHOWN_S = 60.0

log = logging.getLogger(__name__)


def active() -> bool:
    """Whether this process is one of several ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 without a group."""
    return distributed.get_rank() if active() else 0


def world_size() -> int:
    """Number of ranks, 1 without a group."""
    return distributed.get_world_size() if active() else 1


def set_timeout(seconds: float) -> None:
    """How long a collective of this group waits for a rank from now on. transformers and DeepSpeed leave 30 minutes."""
    if active():
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), distributed.group.WORLD)


def barrier() -> None:
    """Wait for every rank."""
    if active():
        distributed.barrier()


@contextmanager
def in_turn(needed: bool = True) -> Iterator[None]:
    """Let the ranks of this machine through the block one after the other; nothing in it may wait for another rank.

    For what takes much of the machine's memory for a moment: eight ranks that load a model at once, each to move it to its
    own GPU, would hold it eight times.

    Args:
        needed: without it, all go through at once.
    """
    if not (needed and active()):
        yield
        return
    mine, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    for _ in range(mine):
        barrier()
    yield
    for _ in range(mine, ranks):
        barrier()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block takes long, say so in the log every WAIT_SHOWN_S seconds: a rank that waits is not a rank that hangs."""
    done = Event()
    started = time.monotonic()

    def tell() -> None:
        while not done.wait(WAIT_SHOWN_S):
            log.info("waiting for %s since %.0f s", what, time.monotonic() - started)

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Element-wise OR of `flags` over the ranks; every rank must call it."""
    if not active():
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def over_ranks(sums: list[float], most: float) -> tuple[list[float], float]:
    """Sums of numbers over the ranks, and the largest of another; through the CPU, so that no GPU is waited for.

    Every rank must call it.
    """
    if not active():
        return sums, most
    added, largest = torch.tensor(sums, dtype=torch.float64), torch.tensor(most, dtype=torch.float64)
    distributed.all_reduce(added)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return added.tolist(), float(largest)


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not active():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every rank's value on every rank, by rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
