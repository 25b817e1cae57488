"""How many stages run side by side, on which GPUs, with how many cores."""

from __future__ import annotations

from typing import Any

import pytest

from tinylmm.config.cores import CORES, usable_cores
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.share import Share
from tinylmm.errors import UserError
from tinylmm.launch import slots
from tinylmm.launch.slots import Slots


def places(monkeypatch: pytest.MonkeyPatch, gpus: list[str], cores: int = 8, **launch: Any) -> Slots:
    monkeypatch.setattr(slots, "gpu_names", lambda: gpus)
    monkeypatch.setattr(slots, "usable_cores", lambda: cores)
    backend = {"backend": "torchrun"} if launch.get("nproc", 1) > 1 else {}
    return Slots([LaunchSpec.model_validate(backend | launch)])


@pytest.mark.parametrize(
    ("gpus", "launch", "expected"),
    [
        (0, {}, [()]),
        (1, {}, [()]),
        (4, {}, [("0",), ("1",), ("2",), ("3",)]),
        (5, {"nproc": 2}, [("0", "1"), ("2", "3")]),
        (4, {"nproc": 4}, [()]),
        (4, {"slots": 2}, [("0",), ("1",)]),
        (4, {"device": "cpu"}, [()]),
        (4, {"device": "cpu", "slots": 2}, [(), ()]),
        (0, {"slots": 3}, [(), (), ()]),
    ],
    ids=[
        "no GPU",
        "one GPU",
        "four",
        "two each",
        "all for one",
        "two wanted",
        "CPU",
        "two on the CPU",
        "three on CPUs",
    ],
)
def test_places_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, gpus: int, launch: dict[str, Any], expected: list[tuple[str, ...]]
) -> None:
    found = places(monkeypatch, [str(n) for n in range(gpus)], **launch)
    assert [found.take(0).gpus for _ in range(found.number)] == expected and found.free == 0


def test_only_visible_gpus_are_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = places(monkeypatch, ["3", "GPU-ab"])
    assert [found.take(0).gpus, found.take(0).gpus] == [("3",), ("GPU-ab",)]


def test_more_places_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"slots is 3, which with launch\.nproc=2 needs 6 GPUs, and 4 can be seen. Set launch\.slots=2"
    ):
        places(monkeypatch, ["0", "1", "2", "3"], nproc=2, slots=3)


def test_cores_are_divided_by_the_stages_that_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = places(monkeypatch, [], cores=8, slots=4)
    alone = found.take(waiting=0)
    assert alone.cores == 8, "nothing else could use them"
    assert found.take(waiting=1).cores == 2 and found.take(waiting=9).cores == 2
    found.give_back(alone)
    assert found.free == 2
    assert places(monkeypatch, [], cores=8).take(waiting=5) == Share(), "one place has all"


@pytest.mark.parametrize(
    ("share", "ranks", "before", "after"),
    [
        (Share(), 1, {"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7"}),
        (Share(cores=4), 1, {}, {"OMP_NUM_THREADS": "4", CORES: "4"}),
        (Share(cores=4), 2, {}, {"OMP_NUM_THREADS": "2", CORES: "4"}),
        (Share(cores=4), 1, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", CORES: "4"}),
        (Share(cores=1), 4, {"OMP_NUM_THREADS": "8"}, {"OMP_NUM_THREADS": "1", CORES: "1"}),
        (Share(("2", "3")), 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {"CUDA_VISIBLE_DEVICES": "2,3"}),
    ],
    ids=["all", "four cores", "two ranks", "fewer asked for", "more ranks than cores", "GPUs"],
)
def test_a_process_sees_its_share(share: Share, ranks: int, before: dict[str, str], after: dict[str, str]) -> None:
    threads = share.take(ranks, environment := dict(before))
    assert environment == after
    assert threads == (int(after["OMP_NUM_THREADS"]) if share.cores else None)


def test_a_share_of_the_cores_is_all_that_a_stage_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES, "1")
    assert usable_cores() == 1
