"""What a worker process left in its stage's folder when it ended, and how that is said."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tinylmm.store.layout import ERROR_FILE, LOG_FILE

LOG_TAIL_LINES = 20


def read_result(path: Path) -> dict[str, Any]:
    """The content of a `result.json`: {"summary"}, or {"error", "type", "exit_code", "rank"}."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def ending(code: int) -> str:
    """Say how a process ended; minus the number of a signal that ended it."""
    if code >= 0:
        return f"exit code {code}"
    why = ": killed from outside, or by the kernel for want of memory" if code == -signal.SIGKILL else ""
    return f"exit code {code} ({signal.Signals(-code).name}{why})"


def last_lines(path: Path, begin: int = 0) -> str:
    """The last lines of a log, from byte `begin` on, indented."""
    return tail(path.read_bytes()[begin:])


def tail(words: bytes) -> str:
    """The last lines of what a process wrote, indented."""
    lines = words.decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])


def failed_with(kind: str, name: str, error: str, folder: Path) -> str:
    """Say of a stage that failed with an error that is not ours where to look."""
    return (
        f"{kind} {name} failed with {error}\n  traceback: {folder / ERROR_FILE}\n  log:       {folder / LOG_FILE}\n"
        f"  The same command tries it again from its last checkpoint."
    )
