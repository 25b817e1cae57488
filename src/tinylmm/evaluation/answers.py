"""Answers on disk while an evaluation runs: one JSON line an answer, safe against a kill and a flipped bit. No torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tinylmm.stop import require_claim
from tinylmm.store.rows import frame, read_rows

log = logging.getLogger(__name__)


class AnswerFile:
    """Appends rows to a JSONL file; what `append` returned from is on disk and stays.

    A kill can leave half a last line: it is cut off when the file is opened again, and its questions are asked again.
    One file has one writer (each rank its own).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        keep = _whole_lines(self._descriptor, size)
        if keep != size:
            os.ftruncate(self._descriptor, keep)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, each with a `mode` and an `id`, and wait until the disk has them."""
        require_claim()
        data = b"".join(map(frame, rows))
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def read_answers(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """All rows of the answer files in `folder`, by (mode, id); of an answer given twice the first counts.

    A line that is not what was written is dropped with a warning, so that its question is asked again.
    """
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in read_rows(path):
            if row is None:
                log.warning("%s, line %d is damaged and dropped: its question is asked again", path, number)
            else:
                answers.setdefault((row["mode"], row["id"]), row)
    return answers


def shard(groups: Sequence[str], rank: int, world_size: int) -> list[int]:
    """Indices of the entries that this rank takes; entries with the same group (image) go to the same rank.

    Groups are dealt round in the order in which they first occur; the shards of all ranks hold every index once.
    """
    numbers: dict[str, int] = {}
    return [i for i, group in enumerate(groups) if numbers.setdefault(group, len(numbers)) % world_size == rank]


def _whole_lines(descriptor: int, size: int) -> int:
    """Bytes up to and with the last line end."""
    block = 65536
    end = size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
