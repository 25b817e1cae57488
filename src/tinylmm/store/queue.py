"""What SLURM says of jobs."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterable

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30
_UNKNOWN = "Invalid job id"


def queued(jobs: Iterable[str]) -> dict[str, str] | None:
    """Return the state (PENDING, RUNNING, ...) of those jobs that wait or run; None where that cannot be found out."""
    ids = sorted(set(jobs))
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={','.join(ids)}"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("squeue does not answer (%s)", error)
        return None
    if said.returncode and _UNKNOWN not in said.stderr:  # it forgets jobs minutes after their end
        log.warning("squeue does not answer (%s)", said.stderr.strip())
        return None
    states = dict(line.split(maxsplit=1) for line in said.stdout.splitlines() if line.strip())
    return {job: state.strip() for job, state in states.items() if state.strip() not in OVER}


OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}
"""States from which a job does not come back. PREEMPTED is none: such a job waits to be started again."""
