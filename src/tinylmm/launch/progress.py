"""Shows how far a grid and the stages at hand are, read from the metrics.jsonl that any backend's rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinylmm.errors import printable
from tinylmm.launch.estimate import Estimate, clock
from tinylmm.store.claims import Owner
from tinylmm.store.layout import METRICS_FILE
from tinylmm.store.stage import Stage

REFRESH_SECONDS = 0.5
LINE_SECONDS = 15.0
TAIL_BYTES = 4096
FIGURES: dict[str, Callable[[Any], str]] = {
    "tokens_per_s": lambda value: f"{value:,.0f} tokens/s",
    "mfu": lambda value: f"MFU {value:.0%}",
    "peak_share": lambda value: f"{value:.0%} of the measured peak",
    "device": lambda value: f"({value})",
    "data_wait": lambda value: f"waits for data {value:.0%}",
    "padding": lambda value: f"padding {value:.0%}",
    "peak_memory_gib": lambda value: f"{value:.1f} GiB",
}
"""Fields of a training's row, and how they are said."""


@dataclass
class _Shown:
    """A stage that runs, as it is shown."""

    title: str
    path: Path
    began: float
    began_at: float
    """The same moment in seconds since the epoch, as rows have it."""
    first: dict[str, Any] | None = None
    """The first row of this try: a pace that is reckoned from an earlier one's counts the time in which nothing ran."""
    said: str = ""
    done_at: float | None = None
    """When it says that it will be done, on the monotonic clock."""


class Progress:
    """What a grid says while it runs: a live table on a terminal, plain lines elsewhere, one for each stage that ends.

    Args:
        slots: stages that run side by side.
        left: returns the stages that are not done.
        every: called twice a second, for what is to be written down meanwhile.
        estimate: of how long stages take.
    """

    def __init__(
        self,
        console: Console,
        slots: int,
        left: Callable[[], list[Stage]],
        every: Callable[[], None],
        estimate: Estimate,
    ) -> None:
        self.console = console
        self.estimate = estimate
        self._slots, self._left, self._every = slots, left, every
        self._total = len(left())
        self._mark = "✓" if console.encoding.lower().startswith("utf") else "ok"
        self._running: dict[str, _Shown] = {}
        self._elsewhere: set[str] = set()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    def begins(self, stage: Stage, title: str, folder: Path) -> None:
        """A stage is started in its work folder."""
        with self._lock:
            self._elsewhere.discard(stage.digest)
            self._running[stage.digest] = _Shown(title, folder / METRICS_FILE, time.monotonic(), time.time())
        if self._live is None:
            self.console.print(Text(title))

    def ends(self, stage: Stage, seconds: float | None, remarks: Sequence[str] = ()) -> None:
        """A stage has its result, after so many seconds of work; None if it was there.

        Args:
            remarks: sentences on what the stage has left out.
        """
        self.leaves(stage)
        took = "reused" if seconds is None else f"{seconds:.1f} s"
        line = f" {stage.kind:8} {stage.name:24} {stage.digest[:12]}  {took}"
        self.console.print(Text.assemble("  ", (self._mark, "green"), line))
        for sentence in remarks:
            self.console.print(f"      {sentence}", style="yellow", highlight=False)

    def leaves(self, stage: Stage) -> None:
        """A stage does not run any more."""
        with self._lock:
            self._running.pop(stage.digest, None)
            self._elsewhere.discard(stage.digest)

    def waits(self, stage: Stage, title: str, owner: Owner) -> None:
        """Another process works on a stage; it is said once."""
        with self._lock:
            known = stage.digest in self._elsewhere
            self._elsewhere.add(stage.digest)
        if not known:
            self.console.print(Text(f"{title}  waiting: process {owner.pid} on {owner.host} is doing it"))

    def _watch(self) -> None:
        last_line = time.monotonic()
        while not self._done.wait(REFRESH_SECONDS):
            self._every()
            with self._lock:
                for shown in self._running.values():
                    _look(shown)
                if self._live is not None:
                    self._live.update(self._table(), refresh=True)
                elif time.monotonic() - last_line >= LINE_SECONDS:
                    for shown in self._running.values():
                        if shown.said:
                            self.console.print(Text(f"{shown.title}  {shown.said}"))
                    if "ETA" in (end := self._end()):
                        self.console.print(Text(end))
                    last_line = time.monotonic()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for shown in self._running.values():
            table.add_row(
                Text(printable(shown.title)), clock(time.monotonic() - shown.began), Text(printable(shown.said))
            )
        table.add_row(Text(self._end(), style="bold"))
        return table

    def _end(self) -> str:
        """`12 of 24 stages done, 2 running, ETA of all 1:02:03`."""
        left = self._left()
        now = time.monotonic()
        elapsed = {digest: now - shown.began for digest, shown in self._running.items()}
        known = {d: max(0.0, shown.done_at - now) for d, shown in self._running.items() if shown.done_at is not None}
        parts = [f"{self._total - len(left)} of {self._total} stages done", f"{len(self._running)} running"]
        if self._elsewhere:
            parts.append(f"{len(self._elsewhere)} running in another process")
        seconds = self.estimate.left(left, elapsed, self._slots, known)
        return ", ".join(parts + ([] if seconds is None else [f"ETA of all {clock(seconds)}"]))


def _look(shown: _Shown) -> None:
    """Read how far a stage is."""
    row = last_row(shown.path)
    if row is not None and {"step", "share"} & row.keys():
        if shown.first is None and row["time"] >= shown.began_at:
            shown.first = row
        if "eta_s" in row and row["time"] >= shown.began_at:
            shown.done_at = time.monotonic() + row["eta_s"] - (time.time() - row["time"])
        shown.said = describe(row, shown.first or row)


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

    `step 120/600  loss 1.23  412 samples/s  51,200 tokens/s  MFU 41%  ...  ETA 1:20` of a training,
    `81,920 images  38 %  4,210/s  ETA 0:32` of a pass over a source, of which a share is done.
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
    parts += [form(row[name]) for name, form in FIGURES.items() if name in row]
    if steps:
        parts += _eta(row["time"] - first["time"], step - first["step"], steps - step)
    return "  ".join(parts)


def _eta(seconds: float, done: float, left: float) -> list[str]:
    """When `left` will be done, where `done` took so many seconds."""
    if done <= 0:
        return []
    return [f"ETA {clock(seconds / done * left)}"]
