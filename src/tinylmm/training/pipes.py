"""Batches from reading processes to their rank where shared memory is too small for them.

torch hands tensors over through /dev/shm. In a container that is 64 MB by default; a reader that finds it full dies, or fails
where nobody hears it, and its rank waits for ever. Through a pipe a batch takes longer and needs none of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylmm.config.cores import usable_cores
from tinylmm.config.launch import LaunchSpec

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 1_000_000_000
"""Of shared memory: room for some batches of several readers, as pixels of a few hundred images."""


MOST_READERS = 16
"""Processes of one rank, however many cores it has: each holds a copy of the data set's index."""


def num_readers(launch: LaunchSpec, on_gpu: bool, cached: bool) -> int:
    """Processes that read samples for one rank: launch.num_workers, or by itself a rank's share of the cores.

    None where there is little to read, since the images' features are `cached`; nor on a CPU, whose cores the step takes.
    """
    if launch.num_workers != "auto":
        return launch.num_workers
    return min(MOST_READERS, max(1, usable_cores() // launch.nproc)) if on_gpu and not cached else 0


def readahead(num_workers: int, accumulation: int) -> int | None:
    """Batches that each process reads ahead: the next step's micro-batches are there when it begins."""
    return max(2, -(-2 * accumulation // num_workers)) if num_workers else None


def shared_memory_bytes() -> int:
    """Size of this machine's (or container's) shared memory; 0 where there is none."""
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return stat.f_frsize * stat.f_blocks


def needs_pipes(num_workers: int) -> bool:
    """Whether readers shall send batches through pipes; says so, and what to do about it."""
    size = shared_memory_bytes()
    if not num_workers or size >= ENOUGH_BYTES:
        return False
    log.warning(
        "%s has %.0f MB, too little for the batches of %d readers (launch.num_workers): they come through pipes, which is "
        "slower. Give the container more (docker run --shm-size=8g), or set launch.num_workers=0.",
        SHARED_MEMORY,
        size / 1e6,
        num_workers,
    )
    return True


class Packed:
    """A collator whose tensors are pickled as they are, in place of being moved into shared memory."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """The batch, each tensor as its type and bytes."""
        batch = self.collate(samples)
        return {key: _pack(value) if isinstance(value, Tensor) else value for key, value in batch.items()}


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors again; one that was not packed stays as it is."""
    return {key: _unpack(value) if isinstance(value, _Pack) else value for key, value in batch.items()}


class _Pack:
    """A tensor's bytes, type and shape."""

    def __init__(self, data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.data, self.dtype, self.shape = data, dtype, shape


def _pack(tensor: Tensor) -> _Pack:
    flat = tensor.contiguous().flatten().view(torch.uint8)  # numpy knows no bf16
    return _Pack(flat.numpy(), tensor.dtype, tuple(tensor.shape))


def _unpack(pack: _Pack) -> Tensor:
    return torch.from_numpy(pack.data).view(pack.dtype).view(pack.shape)
