"""The progress rows of a stage: metrics.jsonl, written by rank 0, read by whoever watches. No torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tinylmm.stop import require_claim
from tinylmm.store.rows import frame, read_rows


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
        line = frame({"time": round(time.time(), 3), **row})
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def forget_after(self, step: int, rows: bytes | None = None) -> None:
        """Go on behind `step`: drop the rows that a killed try wrote after it, and damaged ones.

        Args:
            rows: the file's content as the checkpoint that is resumed from kept it; it takes the place of what is there.
        """
        if rows is not None:
            self.path.write_bytes(rows)
        if self.path.exists():
            found = [row for _, row in read_rows(self.path) if row is not None]
            kept = [frame(row) for row in found if isinstance(row.get("step"), int | float) and row["step"] <= step]
            self.path.write_bytes(b"".join(kept))

    def content(self) -> bytes:
        """The rows so far, for a checkpoint to keep; damaged ones are not among them."""
        if not self.path.exists():
            return b""
        return b"".join(frame(row) for _, row in read_rows(self.path) if row is not None)
