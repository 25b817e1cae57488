"""How many GPUs there are, found out without torch, so that planning stays fast."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

CPU_RANKS = 2
"""Ranks where there is no GPU: enough to try out what several do."""


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """Number of NVIDIA GPUs that a process of ours would see: CUDA_VISIBLE_DEVICES, else the driver's devices."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if not (devices / "nvidiactl").exists():
        return 0
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"])
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.iterdir())


def ranks_here(device: str) -> int:
    """What `launch.nproc=auto` means on this machine: one rank a GPU, or CPU_RANKS.

    Args:
        device: launch.device; with `cpu`, GPUs do not count.
    """
    return (0 if device == "cpu" else visible_gpus()) or CPU_RANKS
