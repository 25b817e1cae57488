"""Steps are defined by samples: every sample once an epoch, whatever the ranks and micro-batches."""

from __future__ import annotations

import pytest

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
