"""Batches: image expansion, cutting, shifting within samples, packing and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.data.collate import Collator, sample_length, supervised_after_cut
from tinylmm.errors import DataError

X, IMAGE = IGNORE_INDEX, IMAGE_TOKEN_ID


def sample(name: str, ids: list[int], supervised: int, images: tuple[str, ...] = ()) -> dict[str, Any]:
    """A prepared sample of which the last `supervised` ids are supervised."""
    labels = [X] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    return {"sample_id": name, "input_ids": ids, "labels": labels, "images": list(images)}


def pixels(path: str) -> torch.Tensor:
    return torch.full((3, 2, 2), float(path))


def collator(**changes: Any) -> Collator:
    options: dict[str, Any] = {
        "image_tokens": 3,
        "pad_id": 0,
        "row_tokens": 16,
        "packing": True,
        "image": pixels,
        "max_length": 16,
    }
    return Collator(**{**options, **changes})


def test_image_slot_becomes_as_many_positions_as_the_image_has_tokens() -> None:
    batch = collator()([sample("a", [5, IMAGE, 6, 7], 2, ("1",))])
    assert batch["input_ids"].tolist() == [[5, IMAGE, IMAGE, IMAGE, 6, 7, 0, 0]]
    assert batch["targets"].tolist() == [[X, X, X, 6, 7, X, X, X]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert torch.equal(batch["pixel_values"], pixels("1")[None])
    assert (batch["sample_ids"], batch["num_samples"], batch["image_paths"]) == (["a"], 1, ["1"])


def test_no_target_reaches_into_the_next_sample_of_a_row() -> None:
    batch = collator()([sample("a", [1, 2, 3], 3), sample("b", [4, 5, 6], 3)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]]
    assert batch["targets"].tolist() == [[2, 3, X, 5, 6, X, X, X]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def test_packing_is_first_fit_decreasing_with_ties_in_order() -> None:
    samples = [sample(name, [1] * length, 1) for name, length in zip("abcdef", (3, 9, 7, 16, 6, 7), strict=True)]
    batch = collator()(samples)
    assert batch["sample_ids"] == ["d", "b", "c", "f", "e", "a"]
    assert batch["input_ids"].shape == (3, 16)
    assert batch["num_samples"] == 6


def test_images_come_in_the_order_of_their_slots_row_by_row() -> None:
    samples = [
        sample("a", [1, IMAGE], 0, ("1",)),
        sample("b", [1] * 10 + [IMAGE, IMAGE], 0, ("2", "3")),
        sample("c", [9], 0),
        sample("d", [1, IMAGE], 0, ("2",)),
    ]
    batch = collator()(samples)
    assert batch["sample_ids"] == ["b", "a", "d", "c"]
    assert batch["image_paths"] == ["2", "3", "1", "2"]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2.0, 3.0, 1.0, 2.0]
    assert int((batch["input_ids"] == IMAGE).sum()) == 4 * 3


def test_without_image_function_only_paths_are_given() -> None:
    batch = collator(image=None)([sample("a", [1, IMAGE], 0, ("1",))])
    assert batch["pixel_values"] is None
    assert batch["image_paths"] == ["1"]


def test_without_packing_every_sample_has_its_row_in_the_given_order() -> None:
    batch = collator(packing=False)([sample("a", [1], 1), sample("b", [2] * 9, 1), sample("c", [3, 4], 1)])
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["input_ids"].shape == (3, 16)
    assert batch["pixel_values"] is None
    assert batch["segment_ids"][2].tolist() == [0] * 2 + [1] * 14


def test_sample_longer_than_a_row_has_a_row_of_its_own() -> None:
    batch = collator(row_tokens=4)([sample("a", [1] * 10, 1), sample("b", [2], 1)])
    assert batch["input_ids"].shape == (2, 16)


def test_no_samples_give_one_row_of_padding() -> None:
    batch = collator()([])
    assert batch["input_ids"].tolist() == [[0] * 8]
    assert batch["targets"].tolist() == [[X] * 8]
    assert batch["position_ids"].tolist() == [list(range(8))]
    assert (batch["num_samples"], batch["sample_ids"], batch["pixel_values"]) == (0, [], None)


def test_long_sample_is_cut_from_the_right_and_loses_images_behind_the_cut() -> None:
    batch = collator(max_length=5)([sample("a", [1, IMAGE, 2, 3, IMAGE], 0, ("1", "2"))])
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, IMAGE, 2, 0, 0, 0]]
    assert batch["image_paths"] == ["1"]


def test_cut_right_behind_an_image_keeps_it() -> None:
    assert collator(max_length=4)([sample("a", [1, IMAGE, 2], 1, ("1",))])["image_paths"] == ["1"]


def test_cut_right_before_an_image_drops_it() -> None:
    assert collator(max_length=1)([sample("a", [1, IMAGE, 2], 1, ("1",))])["image_paths"] == []


@pytest.mark.parametrize(
    ("max_length", "kept", "images"),
    [
        (2, [1, 2], []),
        (3, [1, 2], []),
        (4, [1, 2], []),
        (5, [1, 2, IMAGE, IMAGE, IMAGE], ["1"]),
        (8, [1, 2, IMAGE, IMAGE, IMAGE, 3], ["1"]),
    ],
)
def test_an_image_that_the_cut_would_halve_goes_whole(max_length: int, kept: list[int], images: list[str]) -> None:
    batch = collator(max_length=max_length, packing=False)([sample("a", [1, 2, IMAGE, 3, IMAGE, 4], 1, ("1", "2"))])
    assert (batch["input_ids"][0, : len(kept)].tolist(), batch["image_paths"]) == (kept, images)
    assert batch["input_ids"][0, len(kept) :].eq(0).all()


def test_a_sample_of_two_images_is_cut_before_the_second_and_counted_as_cut_so() -> None:
    record = sample("a", [1, IMAGE, 2, 3, IMAGE, 4, 5], 6, ("1", "2"))
    record["labels"] = [X, X, 2, 3, X, 4, 5]
    for max_length in range(1, 12):
        batch = collator(max_length=max_length, packing=False)([record])
        trained = int((batch["targets"] != X).sum())
        assert trained == supervised_after_cut(record, 3, max_length), max_length
        assert len(batch["image_paths"]) == (max_length >= 4) + (max_length >= 9)


def test_slots_and_images_that_differ_in_number_are_refused_by_sample() -> None:
    with pytest.raises(DataError, match="sample 'a': 2 image slots but 1 images"):
        collator()([sample("a", [IMAGE, IMAGE], 0, ("1",))])


@pytest.mark.parametrize(("max_length", "length", "supervised"), [(16, 6, 2), (5, 5, 1), (4, 4, 0), (2, 2, 0)])
def test_length_and_supervision_after_the_cut_are_known_without_expanding(
    max_length: int, length: int, supervised: int
) -> None:
    record = sample("a", [5, IMAGE, 6, 7], 2, ("1",))
    assert sample_length(record, 3, max_length) == length
    assert supervised_after_cut(record, 3, max_length) == supervised


def test_first_token_of_a_sample_is_never_predicted_and_not_counted() -> None:
    record = sample("a", [1, 2, 3], 3)
    targets = collator()([record])["targets"]
    assert supervised_after_cut(record, 3, 16) == int((targets != X).sum()) == 2


@pytest.mark.parametrize("change", [{"image_tokens": 0}, {"row_tokens": 0}, {"max_length": 0}, {"pad_id": -1}], ids=str)
def test_impossible_sizes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        collator(**change)
