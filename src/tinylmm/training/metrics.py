"""The progress rows of a stage: metrics.jsonl, written by rank 0, read by whoever watches. No torch."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tinylmm.stop import require_claim


class MetricsFile:
    """A stage's metrics.jsonl.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **row: Any) -> None:
        """Append one row, stamped with the time. Call it on rank 0 only."""
        require_claim()
        line = json.dumps({"time": round(time.time(), 3), **row}, allow_nan=True) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def forget_after(self, step: int) -> None:
        """Drop the rows that a killed try wrote after the checkpoint it is resumed from: they are written again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a row that a crash cut short
