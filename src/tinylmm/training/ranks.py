"""Small questions to the process group that also have an answer without one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed


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


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Element-wise OR of `flags` over the ranks; every rank must call it."""
    if not active():
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


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
