"""Which stage of a graph runs next, and what becomes of the rest when one fails."""

from __future__ import annotations

import pytest

from tinylmm.launch import scheduler
from tinylmm.launch.estimate import Estimate, clock
from tinylmm.launch.scheduler import Schedule
from tinylmm.store.stage import Stage


def stage(name: str, *parents: Stage, kind: str = "prepare") -> Stage:
    return Stage.of(kind, name, 1, {"name": name}, {str(n): one.digest for n, one in enumerate(parents)}, {})


def order(*stages: Stage, slots: int = 1) -> list[str]:
    """Names in the order in which so many slots take them, where each stage takes as long as any other."""
    schedule, taken, running = Schedule(stages), [], []
    while not schedule.over:
        while len(running) < slots and (one := schedule.next()) is not None:
            running.append(one)
            taken.append(one.name)
        schedule.done(running.pop(0))
    return taken


def test_the_longest_way_to_an_end_of_the_graph_comes_first() -> None:
    short = stage("short", kind="train")
    first = stage("first")
    second = stage("second", first, kind="train")
    third = stage("third", second, kind="train")
    assert order(short, first, second, third) == ["first", "second", "short", "third"]
    assert order(short, first, second, third, slots=2) == ["first", "short", "second", "third"]


def test_of_equally_long_ways_the_stage_that_frees_most_comes_first() -> None:
    few, many = stage("few"), stage("many")
    ends = [stage("a", few), *(stage(f"b{n}", many) for n in range(3))]
    assert order(few, many, *ends)[0] == "many"


def test_of_equals_the_earlier_one_comes_first() -> None:
    stages = [stage(str(n)) for n in range(12)]
    assert order(*stages) == [str(n) for n in range(12)]


def test_a_stage_comes_only_after_all_its_parents() -> None:
    a, b = stage("a"), stage("b")
    schedule = Schedule([a, b, stage("c", a, b)])
    assert [schedule.next(), schedule.next(), schedule.next()] == [a, b, None]
    schedule.done(a)
    assert schedule.next() is None
    schedule.done(b)
    last = schedule.next()
    assert last is not None and last.name == "c"


def test_a_parent_of_an_earlier_run_is_waited_for_by_nobody() -> None:
    elsewhere = stage("elsewhere", kind="train")
    assert order(stage("eval", elsewhere, kind="eval")) == ["eval"]


def test_a_failed_stage_takes_its_descendants_with_it_and_nothing_else() -> None:
    root = stage("root")
    broken, fine = stage("broken", root), stage("fine", root)
    child, other = stage("child", broken), stage("other", fine)
    grandchild = stage("grandchild", child, fine)
    schedule = Schedule([root, broken, fine, child, grandchild, other])
    assert schedule.next() is root
    schedule.done(root)
    assert [schedule.next(), schedule.next()] == [broken, fine]
    assert [one.name for one in schedule.failed(broken)] == ["child", "grandchild"]
    schedule.done(fine)
    assert schedule.next() is other and schedule.next() is None and not schedule.over
    schedule.done(other)
    assert schedule.over


def test_a_stage_that_another_process_works_on_comes_again_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now)
    taken, free = stage("taken", kind="train"), stage("free")
    schedule = Schedule([taken, free])
    assert schedule.next() is taken
    schedule.postpone(taken)
    assert schedule.next() is free and schedule.next() is None
    schedule.done(free)
    assert not schedule.over
    now += scheduler.FIRST_WAIT_SECONDS
    assert schedule.next() is taken
    schedule.postpone(taken)
    now += scheduler.FIRST_WAIT_SECONDS
    assert schedule.next() is None, "every look comes later than the one before"
    now += scheduler.LAST_WAIT_SECONDS
    assert schedule.next() is taken


def test_what_is_left_takes_as_long_as_its_longest_chain_or_all_of_it_over_the_slots() -> None:
    estimate, a = Estimate(), stage("train", kind="train")
    b = stage("train", a, kind="train")
    others = [stage(f"other {n}", kind="train") for n in range(4)]
    assert estimate.left([a], {}, 1) is None, "nothing is known of such stages"
    estimate.learn(a, 10.0)
    assert estimate.left([a, b], {}, 2) == 20.0
    assert estimate.left([a, b, *others], {}, 2) == 30.0
    assert estimate.left([a, b], {a.digest: 4.0}, 2) == 16.0
    assert estimate.left([a, b, stage("e", b, kind="eval")], {}, 2) is None
    assert (clock(59.9), clock(3600 + 62)) == ("0:59", "1:01:02")


def test_a_stage_is_expected_to_take_as_long_as_those_of_its_name() -> None:
    estimate = Estimate()
    estimate.learn(stage("pretrain", kind="train"), 10.0)
    estimate.learn(stage("finetune", kind="train"), 30.0)
    assert estimate.seconds(stage("finetune", stage("x"), kind="train")) == 30.0
    assert estimate.seconds(stage("share", kind="train")) == 20.0


def test_what_the_planner_reckons_counts_until_such_a_stage_was_seen_and_a_running_one_knows_best() -> None:
    asked = []

    def expected(one: Stage) -> float | None:
        asked.append(one.digest)
        return 100.0 if one.name == "finetune" else None

    estimate, tune = Estimate(expected), stage("finetune", kind="train")
    other = stage("share", tune, kind="train")
    assert estimate.seconds(tune) == estimate.seconds(tune) == 100.0 and asked == [tune.digest], "asked once"
    assert estimate.left([tune, other], {}, 1) is None
    estimate.learn(stage("pretrain", kind="train"), 10.0)
    assert estimate.left([tune, other], {tune.digest: 90.0}, 1) == 10.0 + 10.0
    assert estimate.left([tune, other], {tune.digest: 90.0}, 1, {tune.digest: 42.0}) == 42.0 + 10.0
    estimate.learn(tune, 30.0)
    assert estimate.seconds(tune) == 30.0
