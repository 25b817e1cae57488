"""A limit keeps whole groups and every category, the same for a seed, and changes with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import pope_folder, write_parquet
from tinylmm.evaluation.benchmarks.mmbench import MMBench
from tinylmm.evaluation.benchmarks.mme import COGNITION, MME, PERCEPTION
from tinylmm.evaluation.benchmarks.pope import POPE
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.sampling import sampled

POPE_ITEMS = [
    Item(f"{kind}{n}", n, "?", category=kind, reference=("no", "yes")[n % 2], group=f"{n // 6}.jpg")
    for kind in ("adversarial", "popular", "random")
    for n in range(498)
]
"""Three categories of 83 images with six questions each, three of which are to be answered with yes."""
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
    assert found == {"random": 96, "popular": 96, "adversarial": 96}


@pytest.mark.parametrize("limit", [18, 100, 300, 1000])
def test_pope_keeps_whole_images_with_all_categories_and_as_many_yes_as_no(limit: int) -> None:
    kept = sampled(POPE(), POPE_ITEMS, limit)
    assert limit - 18 < len(kept) <= limit and set(Counter(item.group for item in kept).values()) == {18}
    each = Counter((item.category, item.reference) for item in kept)
    assert len(each) == 6 and len(set(each.values())) == 1


def test_popes_images_are_known_in_either_layout(tmp_path: Path) -> None:
    items = POPE().load(pope_folder(tmp_path / "pope").parent)
    assert [POPE().group_of(item) for item in items] == [item.images[0].path.name for item in items]
    assert len({POPE().group_of(item) for item in items}) == 3 < len(items) == 7
    row = {"question": "Is it?", "answer": "yes", "category": "random"}
    rows = [row | {"question_id": str(n), "image_source": f"COCO_{n // 2}"} for n in range(4)]
    write_parquet(tmp_path / "hf/data/test-00000-of-00001.parquet", rows)
    assert [POPE().group_of(item) for item in POPE().load(tmp_path / "hf", "hf")] == ["COCO_0"] * 2 + ["COCO_1"] * 2
    for one in rows:
        del one["image_source"]
    write_parquet(tmp_path / "old/data/test-00000-of-00001.parquet", rows)
    assert [POPE().group_of(item) for item in POPE().load(tmp_path / "old", "hf")] == [*"0123"]


def test_rotations_stay_together() -> None:
    kept = sampled(MMBench(), MMBENCH_ITEMS, 203)
    groups = Counter(item.reference["base"] for item in kept)
    assert len(kept) == 200 and set(groups.values()) == {4} and len({item.category for item in kept}) == 20


def test_pairs_stay_together_and_small_tasks_are_asked() -> None:
    kept = sampled(MME(), MME_ITEMS, 60)
    assert set(Counter(item.question_id for item in kept).values()) == {2}
    assert {item.category for item in kept} == {*PERCEPTION, *COGNITION} and 58 <= len(kept) <= 60


def test_a_seed_is_a_draw_in_the_files_order_and_a_larger_limit_only_adds() -> None:
    ids = [[item.item_id for item in sampled(POPE(), POPE_ITEMS, n, seed)] for n, seed in ((99, 0), (99, 1), (180, 0))]
    assert ids[0] == [item.item_id for item in sampled(POPE(), POPE_ITEMS, 99, 0)]
    assert ids[0] != ids[1] and set(ids[0]) < set(ids[2])
    order = [item.item_id for item in POPE_ITEMS]
    assert ids[0] == sorted(ids[0], key=order.index) and ids[0] != order[:99]


@pytest.mark.parametrize("limit", [None, 1494, 9999])
def test_no_limit_below_the_number_of_questions_leaves_all(limit: int | None) -> None:
    assert sampled(POPE(), POPE_ITEMS, limit) == POPE_ITEMS


def test_a_group_larger_than_the_limit_is_asked_whole() -> None:
    assert len(sampled(MMBench(), MMBENCH_ITEMS, 3)) == 4
