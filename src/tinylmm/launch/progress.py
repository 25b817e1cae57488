"""Shows how far the stage at hand is, read from the metrics.jsonl that any backend's rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from tinylmm.store.layout import METRICS_FILE

REFRESH_SECONDS = 0.5
LINE_SECONDS = 15.0
TAIL_BYTES = 4096


class StageProgress:
    """While the block runs, a live line on a terminal, or a plain line every 15 seconds into a log.

    Args:
        title: "stage 3 of 9: train finetune".
        folder: the stage's work folder.
    """

    def __init__(self, console: Console, title: str, folder: Path) -> None:
        self.console = console
        self.title = title
        self.path = folder / METRICS_FILE
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._status: Status | None = console.status(Text(title)) if console.is_terminal else None

    def __enter__(self) -> StageProgress:
        if self._status is not None:
            self._status.start()
        else:
            self.console.print(Text(self.title))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()

    def _watch(self) -> None:
        first: dict[str, Any] | None = None
        last_line = time.monotonic()
        while not self._done.wait(REFRESH_SECONDS):
            row = last_row(self.path)
            if row is None or not {"step", "share"} & row.keys():
                continue
            if first is None:
                first = row
            text = f"{self.title}  {describe(row, first)}"
            if self._status is not None:
                self._status.update(Text(text))
            elif time.monotonic() - last_line >= LINE_SECONDS:
                self.console.print(Text(text))
                last_line = time.monotonic()


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a metrics file, or None."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except json.JSONDecodeError:  # the tail may begin in the middle of a row
            logging.getLogger(__name__).debug("half a row at the tail of %s", path)
    return None


def describe(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Return how far a stage is, from its newest row and the first one seen.

    `step 120/600  loss 1.23  412 samples/s  ETA 1:20` of a training, `81,920 images  38 %  4,210/s  ETA 0:32` of a pass over
    a source, of which a share is done.
    """
    return _pass(row, first) if "share" in row else _training(row, first)


def _pass(row: dict[str, Any], first: dict[str, Any]) -> str:
    parts = [f"{row['done']:,} {row['of']}", f"{row['share']:.0%}"]
    seconds = row["time"] - first["time"]
    if seconds > 0:
        parts.append(f"{(row['done'] - first['done']) / seconds:,.0f}/s")
    return "  ".join([*parts, *_eta(seconds, row["share"] - first["share"], 1 - row["share"])])


def _training(row: dict[str, Any], first: dict[str, Any]) -> str:
    step, steps = row["step"], row.get("steps")
    parts = [f"step {step}/{steps}" if steps else f"step {step}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.3f}")
    if "samples_per_s" in row:
        parts.append(f"{row['samples_per_s']:,.0f} samples/s")
    if steps:
        parts += _eta(row["time"] - first["time"], step - first["step"], steps - step)
    return "  ".join(parts)


def _eta(seconds: float, done: float, left: float) -> list[str]:
    """When `left` will be done, where `done` took so many seconds."""
    if done <= 0:
        return []
    remaining = int(seconds / done * left)
    return [f"ETA {remaining // 60}:{remaining % 60:02d}"]
