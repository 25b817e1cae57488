"""A step's samples cut into rows of so many positions at most, samples end to end. No torch."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

import numpy as np


def rows_needed(lengths: np.ndarray, row_tokens: int) -> int:
    """How many rows best fit takes for samples of these lengths, (S,); one at least."""
    return max(1, len(best_fit(lengths, row_tokens)))


def best_fit(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Positions in `lengths`, (S,), of each row's samples: the longest first, each into the fullest row that has room.

    A sample of more than `row_tokens` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, row), sorted
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([sample])
            insort(room, (max(row_tokens - length, 0), len(rows) - 1))
        else:
            left, row = room.pop(place)
            rows[row].append(sample)
            insort(room, (left - length, row))
    return rows


def balanced_rows(lengths: np.ndarray, row_tokens: int, count: int) -> list[list[int]]:
    """Exactly `count` rows, the fullest first, so that ranks which take neighbours have as much to do.

    Samples are dealt evenly, the longest first, each to the emptiest row. Where that fills a row over `row_tokens`, which best
    fit would not, the rows are those of best fit, and empty ones.

    Raises:
        ValueError: best fit takes more rows.
    """
    rows = _even(lengths, count)
    sums = [int(lengths[row].sum()) for row in rows]
    if any(len(row) > 1 and total > row_tokens for row, total in zip(rows, sums, strict=True)):
        rows = best_fit(lengths, row_tokens)
        if len(rows) > count:
            raise ValueError(
                f"{len(lengths)} samples take {len(rows)} rows of {row_tokens} positions, and there are {count}"
            )
        rows += [[] for _ in range(count - len(rows))]
    order = sorted(range(count), key=lambda number: -int(lengths[rows[number]].sum()))
    return [sorted(rows[number]) for number in order]


def _even(lengths: np.ndarray, count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for sample in np.argsort(-lengths, kind="stable").tolist():
        total, number = heapq.heappop(heap)
        rows[number].append(sample)
        heapq.heappush(heap, (total + int(lengths[sample]), number))
    return rows
