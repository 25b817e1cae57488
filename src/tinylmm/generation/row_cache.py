"""Keys and values of rows that come and go, each of its own length, for a batch that never waits for its longest row.

Every row has a place of its own and begins at its first column, so that a row joins by writing its own tokens and leaves by
letting the last one take its place: no other row is copied. Shapes: B rows, S new tokens a row, W columns, H key-value heads,
E a head's width, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tinylmm.generation.decode import next_logits

COLUMNS = 128
"""Room grows by so many columns."""

Segment = list[tuple[Tensor, Tensor]]
"""Keys and values of some tokens of one row, (H, n, E) each, of every layer."""


class _RowLayer(DynamicLayer):
    """One layer's room, (rows, H, columns + 1, E); the last column takes what padding writes, and nobody reads it."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self._owner = owner

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        owner = self._owner
        self.make_room(key_states, value_states)
        places = torch.arange(owner.first, len(owner.lengths), device=key_states.device)[:, None]
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room[places, :, owner.written] = states.transpose(1, 2)
        seen = slice(owner.first, len(owner.lengths)), slice(None), slice(owner.width)
        return self.keys[seen], self.values[seen]

    def make_room(self, keys: Tensor, values: Tensor) -> None:
        """Make the room where there is none yet, for keys and values like these (..., H, n, E)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            shape = self._owner.rows, keys.shape[-3], self._owner.columns + 1
            self.keys, self.values = (states.new_zeros(*shape, states.shape[-1]) for states in (keys, values))

    def resize(self, kept: int, rows: int, columns: int) -> None:
        """Move to another room with its first rows."""
        if not self.is_initialized:
            return
        width = min(columns + 1, self.keys.shape[2]) - 1
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(
                rows, old.shape[1], columns + 1, old.shape[3]
            )  # zeros: 0 times what lay there may be NaN
            new[:kept, :, :width] = old[:kept, :, :width]
            setattr(self, name, new)


class RowCache:
    """The cache of one batch. Only for models whose `CacheKind` is shareable and pads rows of the lengths it holds.

    Attributes:
        lengths: tokens of each row.
        rows, columns: the room there is.
        first, written, width: of the step at hand: the rows from `first` on take part, their new tokens are written to the
            columns `written` (B, S), and they see `width` columns.
    """

    def __init__(self, llm: nn.Module) -> None:
        self.llm = llm
        self.cache = DynamicCache(config=llm.config)
        self._layers = [_RowLayer(self) for _ in self.cache.layers]
        self.cache.layers = list(self._layers)
        self.lengths: list[int] = []
        self._most: list[int] = []
        self.rows = self.columns = self.first = self.width = 0
        self.written = torch.empty(0)

    def add(self, prefix: Sequence[Segment], most: int) -> None:
        """Add a row behind the others.

        Args:
            prefix: its first tokens, computed before.
            most: how long it is expected to become; room for more is made when it is needed.
        """
        row, column = len(self.lengths), 0
        self._most.append(most)
        self._reserve(row + 1)
        for segment in prefix:
            end = column + segment[0][0].shape[1]
            for layer, (keys, values) in zip(self._layers, segment, strict=True):
                layer.make_room(keys, values)
                layer.keys[row, :, column:end], layer.values[row, :, column:end] = keys, values
            column = end
        self.lengths.append(column)

    def remove(self, row: int) -> None:
        """Let a row go; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for layer in self._layers:
                for room in (layer.keys, layer.values):
                    room[row, :, :length] = room[last, :, :length]
            self.lengths[row], self._most[row] = length, self._most[last]
        self.lengths.pop()
        self._most.pop()

    def segment(self, row: int, begin: int, end: int) -> Segment:
        """A copy of what the tokens from `begin` to before `end` of a row left behind."""
        return [
            (layer.keys[row, :, begin:end].clone(), layer.values[row, :, begin:end].clone()) for layer in self._layers
        ]

    @torch.no_grad()
    def step(self, inputs: dict[str, Tensor], counts: Sequence[int], first: int = 0) -> Tensor:
        """Compute new tokens of the rows from `first` on, and return the logits (B, V) behind the last of each.

        Args:
            inputs: `inputs_embeds` (B, S, Dl) or `input_ids` (B, S), shorter rows padded on the left.
            counts: how many of the S tokens of each row are real.
        """
        given = next(iter(inputs.values()))
        lengths = torch.tensor(self.lengths[first:], device=given.device)[:, None]
        pads = given.shape[1] - torch.tensor(list(counts), device=given.device)[:, None]
        offsets = torch.arange(given.shape[1], device=given.device) - pads
        real = offsets >= 0
        columns = lengths + offsets
        ends = [length + count for length, count in zip(self.lengths[first:], counts, strict=True)]
        self._most[first:] = map(max, self._most[first:], ends)
        self._reserve(len(self.lengths))
        self.first, self.width = first, max(ends)
        self.written = columns.where(real, torch.full_like(columns, self.columns))
        positions = columns.where(real, torch.zeros_like(columns))  # padding sees column 0, as softmax needs something
        seen = torch.arange(self.width, device=given.device) <= positions[..., None]
        dtype = next(self.llm.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=given.device).masked_fill(~seen, torch.finfo(dtype).min)
        logits = next_logits(self.llm, inputs, mask[:, None], positions, self.cache)
        self.lengths[first:] = ends
        return logits

    def _reserve(self, rows: int) -> None:
        """See that there is room for so many rows, each as long as it may become; give back what is far too much."""
        longest = max(self._most)
        if rows <= self.rows and longest <= self.columns:
            return
        self.rows, self.columns = 1 << (rows - 1).bit_length(), -(-longest // COLUMNS) * COLUMNS
        for layer in self._layers:
            layer.resize(len(self.lengths), self.rows, self.columns)
