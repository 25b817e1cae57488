"""Which stage of a graph runs next. Knows stages and time, and nothing of how they are run."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable

from tinylmm.planning.kinds import KINDS
from tinylmm.store.stage import Stage

FIRST_WAIT_SECONDS = 0.2
LAST_WAIT_SECONDS = 2.0
WAIT_GROWTH = 1.5
"""Between two looks at a stage that another process works on."""


class Schedule:
    """Hands out the stages of a graph, each once its parents are done.

    First come those with the longest way behind them to an end of the graph (its critical path, in `Kind.length`), of these
    those that most stages wait for, of these the earlier ones.

    Args:
        stages: each after its parents; a parent that is not among them counts as done.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = {stage.digest: stage for stage in stages}
        order = list(self.stages)
        self._number = {digest: number for number, digest in enumerate(order)}
        self._children: dict[str, list[str]] = {digest: [] for digest in order}
        self._missing: dict[str, int] = {}
        """Stage -> how many of its parents are not done."""
        for digest, stage in self.stages.items():
            parents = {parent for parent in stage.parents.values() if parent in self.stages}
            self._missing[digest] = len(parents)
            for parent in parents:
                self._children[parent].append(digest)
        self._behind: dict[str, int] = {}
        """Stage -> its descendants, as bits of their numbers."""
        self._key: dict[str, tuple[float, int, int]] = {}
        self._length: dict[str, float] = {}
        for digest in reversed(order):
            self._weigh(digest)
        self._open = set(order)
        self._ready = [(self._key[digest], digest) for digest in order if not self._missing[digest]]
        heapq.heapify(self._ready)
        self._waiting: list[tuple[float, str]] = []
        self._waits: dict[str, float] = {}

    def _weigh(self, digest: str) -> None:
        children = self._children[digest]
        behind = 0
        for child in children:
            behind |= self._behind[child] | 1 << self._number[child]
        self._behind[digest] = behind
        after = max((self._length[child] for child in children), default=0.0)
        self._length[digest] = after + KINDS[self.stages[digest].kind].length
        self._key[digest] = (-self._length[digest], -behind.bit_count(), self._number[digest])

    @property
    def over(self) -> bool:
        """Whether every stage is done or lost."""
        return not self._open

    @property
    def num_ready(self) -> int:
        """Stages that could start now."""
        return len(self._ready)

    def next(self) -> Stage | None:
        """Take the most urgent stage that can start, or None if there is none at this moment."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            digest = heapq.heappop(self._waiting)[1]
            heapq.heappush(self._ready, (self._key[digest], digest))
        return self.stages[heapq.heappop(self._ready)[1]] if self._ready else None

    def postpone(self, stage: Stage) -> None:
        """Give a stage back that another process works on; it comes again in a while."""
        pause = self._waits.get(stage.digest, FIRST_WAIT_SECONDS)
        self._waits[stage.digest] = min(pause * WAIT_GROWTH, LAST_WAIT_SECONDS)
        heapq.heappush(self._waiting, (time.monotonic() + pause, stage.digest))

    def done(self, stage: Stage) -> None:
        """The stage has its result: what waited for it alone can start."""
        self._open.discard(stage.digest)
        for child in self._children[stage.digest]:
            self._missing[child] -= 1
            if not self._missing[child] and child in self._open:
                heapq.heappush(self._ready, (self._key[child], child))

    def failed(self, stage: Stage) -> list[Stage]:
        """The stage has no result; returns the stages that cannot run for that, and are not to come any more."""
        self._open.discard(stage.digest)
        behind = self._behind[stage.digest]
        lost = [digest for digest in self._open if behind >> self._number[digest] & 1]
        self._open.difference_update(lost)
        return [self.stages[digest] for digest in sorted(lost, key=self._number.__getitem__)]

    def open_stages(self) -> list[Stage]:
        """Stages that are not done, in the graph's order."""
        return [stage for digest, stage in self.stages.items() if digest in self._open]
