"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the machine: `200000 100000` are two cores, `max 100000` all."""
CORES = "TINYLMM_CORES"
"""Environment variable with a stage's share of the cores, where several run side by side."""


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that the scheduler lets us run on, or fewer where the container's quota or a stage's share is less. At least 1."""
    cores = len(os.sched_getaffinity(0))
    share = os.environ.get(CORES, "")
    cores = min(cores, int(share)) if share.isdecimal() and int(share) else cores
    try:
        quota, period = cgroup.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no quota
        return cores
