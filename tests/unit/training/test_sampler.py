"""Steps are defined by samples: every sample once an epoch, whatever the ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from tinylmm.training.rows import balanced_rows, best_fit, rows_needed
from tinylmm.training.sampler import StepSampler, num_steps


def steps_of(world_size: int, micro_batch: int, **options: float) -> list[set[int]]:
    """Per optimiser step, the samples over all ranks and micro-batches."""
    fields = {"num_samples": 23, "global_batch": 8, "epochs": 2.0, "seed": 3} | options
    steps = num_steps(fields["num_samples"], fields["global_batch"], fields["epochs"], None)
    ranks = [
        StepSampler(steps=steps, micro_batch=micro_batch, rank=r, world_size=world_size, **fields)
        for r in range(world_size)
    ]
    accumulation = ranks[0].accumulation
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {steps * accumulation}, "ranks must take the same number of micro-batches"
    assert max(len(micro) for b in batches for micro in b) <= micro_batch
    merged = []
    for step in range(steps):
        indices = [i for b in batches for micro in b[step * accumulation : (step + 1) * accumulation] for i in micro]
        merged.append(indices)
    return [sorted(indices) for indices in merged]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 3), (2, 4), (2, 3), (4, 1), (3, 2)])
def test_a_step_takes_the_same_samples_under_every_layout(world_size: int, micro_batch: int) -> None:
    assert steps_of(world_size, micro_batch) == steps_of(1, 8)


def test_every_sample_is_seen_once_an_epoch_and_none_is_dropped() -> None:
    seen = [index for step in steps_of(2, 4) for index in step]
    assert sorted(seen) == sorted([*range(23), *range(23)])


def test_the_last_step_takes_what_is_left() -> None:
    assert [len(step) for step in steps_of(1, 8)] == [8, 8, 8, 8, 8, 6]


def test_another_seed_gives_another_order() -> None:
    assert steps_of(1, 8)[0] != steps_of(1, 8, seed=4)[0]


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 3), (0.5, None, 2), (2, 4, 4), (1, 9, 3)])
def test_step_count(epochs: float, max_steps: int | None, expected: int) -> None:
    assert num_steps(23, 8, epochs, max_steps) == expected


LENGTHS = np.random.default_rng(5).integers(3, 60, 23)
LENGTHS[4] = 90


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("row_tokens", [60, 100, 5000])
def test_counted_in_positions_a_step_takes_the_same_samples(world_size: int, row_tokens: int) -> None:
    steps = num_steps(23, 8, 2.0, None)
    fields = {"num_samples": 23, "global_batch": 8, "epochs": 2.0, "seed": 3, "micro_batch": None}
    ranks = [
        list(StepSampler(steps=steps, rank=r, world_size=world_size, lengths=LENGTHS, row_tokens=row_tokens, **fields))
        for r in range(world_size)
    ]
    accumulation = len(ranks[0]) // steps
    assert {len(micros) for micros in ranks} == {steps * accumulation}, "ranks take the same number of micro-batches"
    assert accumulation > 1 or row_tokens == 5000
    found = []
    for step in range(steps):
        own = [micros[step * accumulation : (step + 1) * accumulation] for micros in ranks]
        found.append(sorted(i for micros in own for micro in micros for i in micro))
        for micro in (micro for micros in own for micro in micros):
            assert len(micro) <= 1 or LENGTHS[micro].sum() <= row_tokens
    assert found == steps_of(1, 8)


def test_a_long_sample_has_a_row_of_its_own_and_the_others_fit_best() -> None:
    lengths = np.array([10, 70, 30, 40, 20, 25])
    assert [sorted(row) for row in best_fit(lengths, 60)] == [[1], [3, 4], [2, 5], [0]]
    assert [sorted(row) for row in best_fit(lengths, 65)] == [[1], [3, 5], [0, 2, 4]]
    assert rows_needed(lengths, 60) == 4 and rows_needed(np.array([], dtype=np.int64), 60) == 1


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sample_once_within_their_length_and_the_fullest_comes_first(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 300, draw.integers(1, 60))
    least = rows_needed(lengths, 300)
    for count in (least, least + 2):
        rows = balanced_rows(lengths, 300, count)
        assert len(rows) == count and sorted(i for row in rows for i in row) == list(range(len(lengths)))
        sums = [int(lengths[row].sum()) for row in rows]
        assert max(sums) <= 300 and sums == sorted(sums, reverse=True)
    if least > 1:
        with pytest.raises(ValueError, match=f"take {least} rows of 300 positions"):
            balanced_rows(lengths, 300, 1)


def test_rows_of_equal_work_where_there_is_room() -> None:
    lengths = np.array([8, 7, 6, 5, 4, 3, 2, 1])
    assert [int(lengths[row].sum()) for row in balanced_rows(lengths, 20, 4)] == [9, 9, 9, 9]


def test_micro_batches_are_counted_somehow() -> None:
    with pytest.raises(ValueError, match="counted in samples, or in positions"):
        StepSampler(10, 1, 8, 1.0, 0, None)
