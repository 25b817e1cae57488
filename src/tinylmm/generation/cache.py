"""Key-value caches that rows share: what a model's cache allows, room to grow, and choosing and joining of rows.

Shapes: B rows, P tokens of a shared prefix, Dl the LLM's width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

GROW = 64
"""A cache gets room for so many tokens more when it is full; transformers' own copies all of it at every token."""


@dataclass(frozen=True)
class CacheKind:
    """What a model's cache lets us do.

    Attributes:
        shareable: a prefix computed once may be continued by many rows.
        window: shortest sliding window in tokens, None without one; rows longer than it cannot be padded.
        long_from: rows longer than this change the rotary frequencies of all their tokens (`dynamic`, `longrope`), so that
            neither prefix nor batch may be shared; None where there is no such length.
        remembers: transformers' `dynamic` frequencies depend on what the model has seen before, too.
        why: where something is not possible, the reason, for the log.
    """

    shareable: bool
    window: int | None
    long_from: int | None
    remembers: bool = False
    why: str = ""

    def pads(self, tokens: int) -> bool:
        """Whether rows of at most `tokens` tokens may have padding inside."""
        return self.window is None or tokens < self.window


def cache_kind(llm: nn.Module) -> CacheKind:
    """Look at the cache that transformers makes for this model."""
    config: Any = llm.config
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    other = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    rope = getattr(text, "rope_parameters", None)
    remembers = "'dynamic'" in repr(rope)
    why = ""
    if other:
        why = f"the cache of {type(llm).__name__} has layers of kind {', '.join(sorted(other))}"
    return CacheKind(not other, min(windows, default=None), _long_from(rope, text), remembers, why)


def _long_from(rope: Any, config: Any) -> int | None:
    """Shortest length at which a rotary embedding changes its frequencies; rope parameters may be nested by layer type."""
    if not isinstance(rope, dict):
        return None
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("dynamic", "longrope"):
        known = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return int(known or config.max_position_embeddings)
    nested = [_long_from(value, config) for value in rope.values() if isinstance(value, dict)]
    return min((length for length in nested if length is not None), default=None)


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for tokens to come, so that a new one is written in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, spare: int = GROW) -> None:
        super().__init__()
        self._length = 0
        self._spare = spare
        self._rooms: tuple[Tensor, Tensor] | None = None
        if keys is not None and values is not None:
            self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        if self._rooms is None or end > self._rooms[0].shape[-2]:
            self._rooms = (self._larger(self.keys, key_states, end), self._larger(self.values, value_states, end))
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., self._length : end, :] = states
        self._length = end
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def _larger(self, held: Tensor, states: Tensor, end: int) -> Tensor:
        room = states.new_empty((*states.shape[:-2], end + max(self._spare, GROW), states.shape[-1]))
        if self._length:
            room[..., : self._length, :] = held
        return room


def new_cache(llm: nn.Module) -> DynamicCache:
    """An empty cache for this model, with room in its full-attention layers."""
    cache = DynamicCache(config=llm.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor, spare: int = GROW) -> DynamicCache:
    """A new cache whose row i is row `rows[i]` of `cache`, which stays as it is. Only for `CacheKind.shareable` ones.

    Args:
        spare: so many tokens to come find room at once.
    """
    chosen = copy.copy(cache)
    chosen.layers = []
    for layer in cache.layers:
        if layer.get_seq_length() == 0:
            chosen.layers.append(copy.copy(layer))
        elif isinstance(layer, _RoomyLayer):
            keys, values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            chosen.layers.append(_RoomyLayer(keys, values, spare))
        else:
            twin = copy.copy(layer)  # tensors are replaced below, never written in place
            twin.keys, twin.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            chosen.layers.append(twin)
    return chosen


def pick_columns(cache: DynamicCache, rows: Tensor, columns: Tensor) -> DynamicCache:
    """A new cache whose row i holds the `columns[i]` of row `rows[i]`. Only for `CacheKind.shareable` ones.

    Args:
        rows: (G,).
        columns: (G, C), of layers that have forgotten none.
    """
    picked = copy.copy(cache)
    picked.layers = []
    for layer in cache.layers:
        if layer.get_seq_length() == 0:
            picked.layers.append(layer)
            continue
        keys, values = (
            states.transpose(1, 2)[rows[:, None], columns].transpose(1, 2).contiguous()
            for states in (layer.keys, layer.values)
        )
        if isinstance(layer, _RoomyLayer):
            picked.layers.append(_RoomyLayer(keys, values))
        else:
            twin = copy.copy(layer)
            twin.keys, twin.values, twin.cumulative_length = keys, values, columns.shape[1]
            picked.layers.append(twin)
    return picked


def join_rows(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of all, which have seen equally many tokens. Only for `CacheKind.shareable` ones."""
    joined = copy.copy(caches[0])
    joined.layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        if parts[0].get_seq_length() == 0:
            joined.layers.append(parts[0])
            continue
        keys, values = torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts])
        if isinstance(parts[0], _RoomyLayer):
            joined.layers.append(_RoomyLayer(keys, values))
        else:
            twin = copy.copy(parts[0])
            twin.keys, twin.values = keys, values
            joined.layers.append(twin)
    return joined


@torch.no_grad()
def prefill(llm: nn.Module, embeddings: Tensor) -> DynamicCache:
    """Return the cache of prefixes of equal length, (B, P, Dl)."""
    cache = new_cache(llm)
    positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(embeddings.shape[0], -1)
    llm(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
