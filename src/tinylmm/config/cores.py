"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the machine: `200000 100000` are two cores, `max 100000` all."""


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that the scheduler lets us run on, or fewer where the container's quota is less. At least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cgroup.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no quota
        return cores
