"""Images are read ahead of their use, in their order, and a fault of one comes when it is asked for."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tinylmm.errors import DataError
from tinylmm.generation import images
from tinylmm.generation.images import ReadAhead

PATIENCE = 120.0


def test_the_next_image_is_read_while_the_one_before_is_in_use() -> None:
    read = {key: threading.Event() for key in "abc"}

    def load(key: str) -> Tensor:
        read[key].set()
        return torch.tensor([ord(key)])

    with ReadAhead(load, "abc") as ahead:
        assert ahead("a").item() == ord("a")
        assert all(read[key].wait(PATIENCE) for key in "bc")  # nobody has asked for them
        assert [ahead(key).item() for key in "bc"] == [ord("b"), ord("c")]
        assert ahead("a").item() == ord("a")  # again, out of turn


def test_several_read_at_once_and_images_still_come_in_their_order() -> None:
    together = threading.Barrier(2, timeout=PATIENCE)

    def load(key: str) -> Tensor:
        if key in "bc":
            together.wait()  # neither comes without the other
        return torch.tensor([ord(key)])

    with ReadAhead(load, "abcd", readers=2) as ahead:
        assert [ahead(key).item() for key in "abcd"] == [*map(ord, "abcd")]


def test_a_fault_comes_with_its_image_and_no_more_are_read_than_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "READ_AHEAD", 2)
    asked: list[str] = []

    def load(key: str) -> Tensor:
        asked.append(key)
        if key == "b":
            raise DataError("b.jpg is damaged")
        return torch.zeros(1)

    with ReadAhead(load, "abcdefgh") as ahead:
        ahead("a")
        with pytest.raises(DataError, match=r"b\.jpg is damaged"):
            ahead("b")
    assert asked == [*"abcd"][: len(asked)] and len(asked) <= 3  # two waited when "b" was asked for


def test_one_image_needs_no_thread() -> None:
    before = threading.active_count()
    with ReadAhead(lambda key: torch.full((1,), threading.active_count()), "a") as ahead:
        assert ahead("a").item() == before
