"""How many GPUs there are, found out without torch, so that planning stays fast."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

CPU_RANKS = 2
"""Ranks where there is no GPU: enough to try out what several do."""


def gpu_names(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """NVIDIA GPUs that a process of ours would see, each as it stands in CUDA_VISIBLE_DEVICES; else the driver's devices."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if not (devices / "nvidiactl").exists():
        return []
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return [name for name in names if name and name != "-1"]
    found = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.iterdir())
    return [str(number) for number in range(found)]


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """Number of `gpu_names`."""
    return len(gpu_names(environment, devices))


def ranks_here(device: str) -> int:
    """What `launch.nproc=auto` means on this machine: one rank a GPU, or CPU_RANKS.

    Args:
        device: launch.device; with `cpu`, GPUs do not count.
    """
    return (0 if device == "cpu" else visible_gpus()) or CPU_RANKS
