"""The source that a stage reads: where its files lie, and what is done about bad records."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tinylmm.config.cores import usable_cores
from tinylmm.data.records import Place, read_records
from tinylmm.planning.specs import ImagesStage, PartsStage, PrepareStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.pool import heed

T = TypeVar("T")

PROGRESS_SECONDS = 2.0
ASK_EVERY = 256
"""Records between two looks whether a stop was asked for."""


@dataclass(frozen=True)
class Source:
    """Where a stage reads, what records look like, and what it does with bad ones.

    Attributes:
        allowed: how many bad records may be left out; `on_bad` says it in the user's words.
        how_to_get: where the files come from, the end of an error's sentence.
    """

    annotations: Path
    images: Path
    format: str
    limit: int | None
    follow_links: bool
    on_bad: str
    allowed: int
    how_to_get: str

    @classmethod
    def of(cls, job: StageJob[PrepareStage] | StageJob[ImagesStage] | StageJob[PartsStage]) -> Source:
        """Return the source of a stage that reads one."""
        spec = job.spec.source
        (location,) = job.locations
        located = location.source
        if "data" in job.parents:
            assert spec.file is not None  # of a data stage's output, sources are identified by their file
            root, annotations, images, hint = job.parents["data"], spec.file, spec.images, ""
        else:
            assert located.annotations is not None
            root, annotations, images = job.root_of(location), located.annotations, located.images
            hint = located.how_to_get
        policy = (located.on_bad, located.allowed, hint)
        return cls(root / annotations, root / images, spec.format, spec.limit, spec.follow_links, *policy)

    def records(self, place: Place) -> Iterator[Any]:
        """Raw records, of which `limit` count.

        Raises:
            DataError: as `read_records`.
        """
        return islice(read_records(self.annotations, self.format, place), self.limit)


class Progress:
    """Rows of metrics.jsonl that say how far a pass over a source is, one every PROGRESS_SECONDS.

    Args:
        of: what is counted, in the plural.
        doing: what goes on, for the sentence of a stop.
        limit: of the source; where there is one, the share of the file says nothing of how much is left.
    """

    def __init__(self, job: StageJob[Any], of: str, doing: str, place: Place, limit: int | None) -> None:
        self._append = job.metrics.append
        self._of, self._doing, self._place, self._limit = of, doing, place, limit
        self._done, self._records = 0, 0
        self._last = time.monotonic()

    def read(self, records: Iterable[T]) -> Iterator[T]:
        """Hand records on, and count them.

        Raises:
            StoppedError: a stop was asked for.
        """
        for record in records:
            if self._records % ASK_EVERY == 0:
                heed(self._doing)
            self._records += 1
            yield record

    def __call__(self, more: int) -> None:
        """So many more are done."""
        self._done += more
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            share = self._place.share if self._limit is None else max(self._place.share, self._records / self._limit)
            self._append(done=self._done, of=self._of, share=round(min(share, 1.0), 6))


def processes(job: StageJob[Any]) -> int:
    """How many processes share a stage's work on the CPU: all cores, or as many as launch.num_workers says."""
    chosen = job.settings.launch.num_workers
    return usable_cores() if chosen == "auto" else chosen
