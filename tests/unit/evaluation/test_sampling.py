"""A limit keeps whole groups and every category, the same for a seed, and changes with it."""

from __future__ import annotations

from collections import Counter

import pytest

from tinylmm.evaluation.benchmarks.mmbench import MMBench
from tinylmm.evaluation.benchmarks.mme import COGNITION, MME, PERCEPTION
from tinylmm.evaluation.benchmarks.pope import POPE
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.sampling import sampled

POPE_ITEMS = [
    Item(f"{kind}{n}", n, "?", category=kind) for kind in ("random", "popular", "adversarial") for n in range(500)
]
MMBENCH_ITEMS = [
    Item(str(base + 1_000_000 * turn), base, "?", category=f"skill {base % 20}", reference={"base": base})
    for turn in range(4)
    for base in range(200)
]
MME_ITEMS = [
    Item(f"{task}/{n}#{turn}", f"{task}/{n}", "?", category=task)
    for place, task in enumerate((*PERCEPTION, *COGNITION))
    for n in range(20 if place % 2 else 170)
    for turn in (1, 2)
]


def test_every_category_has_its_share() -> None:
    found = Counter(item.category for item in sampled(POPE(), POPE_ITEMS, 300))
    assert found == {"random": 100, "popular": 100, "adversarial": 100}


def test_rotations_stay_together() -> None:
    kept = sampled(MMBench(), MMBENCH_ITEMS, 203)
    groups = Counter(item.reference["base"] for item in kept)
    assert len(kept) == 200 and set(groups.values()) == {4} and len({item.category for item in kept}) == 20


def test_pairs_stay_together_and_small_tasks_are_asked() -> None:
    kept = sampled(MME(), MME_ITEMS, 60)
    assert set(Counter(item.question_id for item in kept).values()) == {2}
    assert {item.category for item in kept} == {*PERCEPTION, *COGNITION} and 58 <= len(kept) <= 60


def test_a_seed_is_a_draw_in_the_files_order_and_a_larger_limit_only_adds() -> None:
    ids = [[item.item_id for item in sampled(POPE(), POPE_ITEMS, n, seed)] for n, seed in ((99, 0), (99, 1), (150, 0))]
    assert ids[0] == [item.item_id for item in sampled(POPE(), POPE_ITEMS, 99, 0)]
    assert ids[0] != ids[1] and set(ids[0]) < set(ids[2])
    order = [item.item_id for item in POPE_ITEMS]
    assert ids[0] == sorted(ids[0], key=order.index) and ids[0] != order[:99]


@pytest.mark.parametrize("limit", [None, 1500, 9999])
def test_no_limit_below_the_number_of_questions_leaves_all(limit: int | None) -> None:
    assert sampled(POPE(), POPE_ITEMS, limit) == POPE_ITEMS


def test_a_group_larger_than_the_limit_is_asked_whole() -> None:
    assert len(sampled(MMBench(), MMBENCH_ITEMS, 3)) == 4
