"""Which samples make up which optimiser step, for every rank.

A step is defined by samples alone: step s takes samples [s*G, (s+1)*G) of the seeded order, G = `global_batch`. Ranks and
accumulation only share them out, so another world size or micro-batch trains the same model.

A micro-batch is so many samples, or as many as have `row_tokens` positions in all (`training/rows.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from tinylmm.training.rows import balanced_rows, rows_needed


def num_steps(num_samples: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a stage; the last one takes what is left, so no sample is dropped."""
    steps = math.ceil(num_samples * epochs / global_batch)
    return min(steps, max_steps) if max_steps is not None else steps


@dataclass(frozen=True)
class Mixture:
    """Which samples an epoch has, of sources that lie one behind the other in the data set.

    Attributes:
        sizes: samples of each source.
        weights: how often an epoch has each sample of it: 2 twice, 0.5 every other one. Epochs take a part of a source in
            turns, so that two epochs at 0.5 have had every sample once.
    """

    sizes: Sequence[int]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(map(self._count, self.sizes, self.weights))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of an epoch's samples, (len(self),), by source; (seed, epoch) alone decide."""
        parts, first = [np.empty(0, dtype=np.int64)], 0
        for position, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            whole = int(weight)
            rest = self._count(size, weight) - whole * size
            order = np.random.default_rng([seed, position, size]).permutation(size)
            turn = order[(epoch * rest + np.arange(rest)) % max(size, 1)]
            parts += [first + np.tile(np.arange(size), whole), first + turn]
            first += size
        return np.concatenate(parts)

    @staticmethod
    def _count(size: int, weight: float) -> int:
        return round(size * weight)


class StepSampler(Sampler[list[int]]):
    """Micro-batches of sample indices for one rank, `accumulation` of them a step; the last step's may be empty.

    Args:
        num_samples: samples in an epoch.
        steps: optimiser steps in all.
        global_batch: samples a step, over all ranks.
        micro_batch: samples that a rank takes at once, at most; None counts their positions alone.
        rank, world_size: which share is this rank's.
        pool: (seed, epoch) -> indices of the epoch's samples, `num_samples` of them; by default all of the data set.
        lengths: positions of each sample of the data set, where they are counted.
        row_tokens: positions that a rank takes at once, at most; a longer sample is taken alone.

    Attributes:
        accumulation: micro-batches a rank takes in each step: as many as the step that needs most.
    """

    def __init__(
        self,
        num_samples: int,
        steps: int,
        global_batch: int,
        epochs: float,
        seed: int,
        micro_batch: int | None,
        rank: int = 0,
        world_size: int = 1,
        pool: Callable[[int, int], np.ndarray] | None = None,
        lengths: np.ndarray | None = None,
        row_tokens: int | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.steps = steps
        self.global_batch = global_batch
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.pool = pool
        self.lengths = lengths
        self.row_tokens = row_tokens
        if micro_batch is not None:
            self.accumulation = math.ceil(global_batch / (micro_batch * world_size))
        elif lengths is None or row_tokens is None:
            raise ValueError(
                "micro-batches are counted in samples, or in positions of which lengths and row_tokens are given"
            )
        else:
            most = max((rows_needed(lengths[step], row_tokens) for step in self._step_indices()), default=1)
            self.accumulation = math.ceil(most / world_size)
        self._by_samples = micro_batch is not None

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self._step_indices():
            yield from self._shares(indices)

    def _step_indices(self) -> Iterator[list[int]]:
        """Indices of the samples of each step."""
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        end = math.ceil(self.num_samples * self.epochs)
        for step in range(self.steps):
            first, last = step * self.global_batch, min((step + 1) * self.global_batch, end)
            indices: list[int] = []
            while first < last:  # a step may reach over the end of an epoch
                epoch, offset = divmod(first, self.num_samples)
                if epoch != order_epoch:
                    order_epoch, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                    order = order if self.pool is None else self.pool(self.seed, epoch)[order]
                count = min(last - first, self.num_samples - offset)
                indices += order[offset : offset + count].tolist()
                first += count
            yield indices

    def _shares(self, indices: list[int]) -> Iterator[list[int]]:
        """Deal a step's samples to all ranks' micro-batches in near-equal shares; yield this rank's."""
        shares = self.accumulation * self.world_size
        if not self._by_samples:
            assert self.lengths is not None and self.row_tokens is not None
            rows = balanced_rows(self.lengths[indices], self.row_tokens, shares)
            for row in rows[self.rank :: self.world_size]:
                yield [indices[position] for position in row]
            return
        bounds = [round(i * len(indices) / shares) for i in range(shares + 1)]
        for index in range(self.rank, shares, self.world_size):
            yield indices[bounds[index] : bounds[index + 1]]
