"""Batches that are read ahead are those of the loader, in its order, with its errors; nobody reads on when it is not wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tinylmm.training.ahead import ReadAhead

CPU = torch.device("cpu")


def batches(count: int, made: list[int]) -> Iterator[dict[str, Any]]:
    for number in range(count):
        made.append(number)
        yield {
            "number": number,
            "ids": torch.arange(number),
            "layout": {"bounds": torch.tensor([number]), "longest": number},
        }


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"double": 2 * batch["number"]}


def test_batches_come_prepared_and_in_order() -> None:
    ahead = ReadAhead(batches(5, []), doubled, 2, CPU)
    found = list(ahead)
    assert [batch["double"] for batch in found] == [0, 2, 4, 6, 8]
    assert all(len(batch["ids"]) == int(batch["layout"]["bounds"]) == batch["layout"]["longest"] for batch in found)
    assert list(ahead) == [], "asked again behind the end"
    ahead.close()


def test_it_reads_ahead_as_far_as_it_was_told() -> None:
    made: list[int] = []
    ahead = ReadAhead(batches(100, made), doubled, 3, CPU)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3], "three wait, and one is in its hands"
    ahead.close()


def test_an_error_comes_where_its_batch_is_asked_for() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from batches(2, [])
        raise OSError("the disk is gone")

    ahead = ReadAhead(broken(), doubled, 5, CPU)
    assert [next(ahead)["number"] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    ahead.close()


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    ahead = ReadAhead(batches(100, []), doubled, 1, CPU)
    assert next(ahead)["number"] == 0 and threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_they_are_there_when_the_step_uses_them() -> None:
    device = torch.device("cuda", 0)
    large = ({"number": n, "ids": torch.full((1 << 22,), n)} for n in range(20))
    for n, batch in enumerate(ReadAhead(large, doubled, 4, device)):
        assert batch["ids"].device == device and int(batch["ids"].sum()) == n << 22
