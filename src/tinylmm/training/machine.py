"""How a training sets up its process for the machine it runs on."""

from __future__ import annotations

import ctypes
import ctypes.util
import logging

import torch

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
LARGEST_KEPT = 32 * 2**20
"""Bytes up to which glibc can be asked to keep what is given back; larger blocks always go back to the kernel."""
KEPT_AT_MOST = 2**30
"""Bytes of unused memory that the process keeps at its end."""


def prepare_machine(device: torch.device) -> None:
    """Before a training's first tensor: let memory that one operation gives back serve the next.

    On a CPU the C library is asked to keep it. By default it returns every tensor of more than 128 KiB to the kernel, which
    clears each page anew for the next tensor: tens of thousands of page faults a step, as many a second as there are
    activations. Numbers stay as they are.
    """
    if device.type == "cuda":
        # Rows differ in length from step to step, and each length would keep pieces of memory that no other one fits.
        _let_segments_grow()
    if device.type != "cpu":
        return
    name = ctypes.util.find_library("c")
    libc = None if name is None else ctypes.CDLL(name)
    if libc is None or not hasattr(libc, "mallopt"):
        log.debug("this C library has no mallopt: memory goes back to the kernel after each operation")
        return
    libc.mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(_TRIM_THRESHOLD, KEPT_AT_MOST)


def _let_segments_grow() -> None:
    """What PYTORCH_ALLOC_CONF=expandable_segments:True does, for a process that may have begun to use the GPU."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # from 2.10, which calls the other one old
    (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
