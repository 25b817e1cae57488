"""Who and what made a result: this process (and whether a recorded one still runs), versions, memory. No torch here.

Claims and run records name their process by (host, PID namespace, boot, pid, start), because a pid alone is reused.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import psutil

from tinylmm.version import __version__

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE_LINK = Path("/proc/self/ns/pid")
START_TOLERANCE_SECONDS = 2.0
"""The kernel's boot time, from which a start time is counted, wavers by a second when the clock is adjusted."""


@dataclass(frozen=True)
class Process:
    """What identifies a process, also after it has ended. The fields are those of JSON files.

    Attributes:
        boot_id, pid_namespace: None where the system has no such thing.
        process_start: seconds after boot.
    """

    pid: int
    host: str
    boot_id: str | None
    pid_namespace: str | None
    process_start: float


def this_process() -> Process:
    """Return what identifies this process."""
    return Process(
        pid=os.getpid(),
        host=socket.gethostname(),
        boot_id=BOOT_ID_FILE.read_text().strip() if BOOT_ID_FILE.exists() else None,
        # Containers that share a host's name do not share its pids: there a pid proves nothing.
        pid_namespace=str(PID_NAMESPACE_LINK.readlink()) if PID_NAMESPACE_LINK.exists() else None,
        process_start=_start_after_boot(psutil.Process()),
    )


def shares_pids(other: Process) -> bool:
    """Whether a process would be seen from here by its pid: same host, boot and PID namespace."""
    here = this_process()
    return (other.host, other.boot_id, other.pid_namespace) == (here.host, here.boot_id, here.pid_namespace)


def is_running(recorded: Process) -> bool | None:
    """Whether the process that `this_process` described still runs; None if that cannot be seen from here.

    A reused pid (another start time) and a zombie count as not running.
    """
    if not shares_pids(recorded):
        return None
    try:
        process = psutil.Process(recorded.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(_start_after_boot(process) - recorded.process_start) < START_TOLERANCE_SECONDS
    except psutil.NoSuchProcess:
        return None if _is_hidden(recorded.pid) else False


def ended_with_boot(recorded: Process, last_sign: float) -> bool:
    """Whether a process ran before this host's last boot, so that it must be gone.

    Args:
        recorded: what `this_process` said there.
        last_sign: when it last gave a sign of life, in seconds since the epoch. Hosts may share a name, so another boot
            alone proves nothing; silence since before this boot does.
    """
    here = this_process()
    other_boot = recorded.host == here.host and recorded.boot_id != here.boot_id
    return other_boot and last_sign < psutil.boot_time()


def _is_hidden(pid: int) -> bool:
    """Whether the process exists but /proc does not show it (a colleague's, where /proc is mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False


def _start_after_boot(process: psutil.Process) -> float:
    # Seconds since the epoch would shift with every adjustment of the clock; the difference does not.
    return round(process.create_time() - psutil.boot_time(), 2)


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return iso(datetime.now(UTC).timestamp())


def iso(seconds: float) -> str:
    """Return a time given in seconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def peak_rss_mib() -> float:
    """Return the largest resident memory so far of this process, or of one of its finished children, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * unit / 2**20, 1)


@lru_cache(maxsize=1)
def software_versions() -> dict[str, str | None]:
    """Return versions of tinylmm, git (commit, `+changed` if files differ from it), python, torch and transformers.

    None stands for what is not there: a package that is not installed, a tinylmm that does not run from its checkout.
    """
    versions: dict[str, str | None] = {
        "tinylmm": __version__,
        "git": _commit(),
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)  # read from metadata: importing torch takes seconds
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _commit() -> str | None:
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent.parent
    if not (checkout / ".git").exists() or package != checkout / "src" / "tinylmm":
        return None  # installed from a wheel: a repository around it is the user's, not ours
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--", "src", "conf")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changed" if changed else "")


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
