"""Greedy decoding over key-value caches that several rows share; the reference decoding that defines the answer.

Shapes: B rows, P tokens of a shared prefix, S of what follows it, V the vocabulary, Dl the LLM's width.

What a row says must not depend on its batch. The same row gives logits that differ in the last bits when it is computed
beside others, behind padding, or over a prefix computed before; the likeliest token is the same all the same unless two
tokens are nearly tied. So a row is followed in its batch only while its best token leads by more than rounding explains
(`TIE`); a row with a near-tie is answered again by `decode_alone`, whose answer is the definition. Then every answer is
that of `decode_alone`, in whatever batch it was asked.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

TIE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""A lead over the second best token below this share of the largest logit is a near-tie. Rounding in fp32 was seen to move
logits by 1e-6 of it. Narrower types have no entry: their rounding is as large as many an honest lead."""
GROW = 64
"""A cache gets room for so many tokens more when it is full; transformers' own copies all of it at every token."""


@dataclass
class Continued:
    """What one row was continued with.

    Attributes:
        ids: new token ids, without the end token.
        steps: tokens computed, the end token counted in.
        seconds: from the batch's start until this row was done.
        tied: the row met a near-tie and `ids` is not to be used.
    """

    ids: list[int]
    steps: int
    seconds: float
    tied: bool = False


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

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self._length = 0
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
        room = states.new_empty((*states.shape[:-2], end + GROW, states.shape[-1]))
        if self._length:
            room[..., : self._length, :] = held
        return room


def new_cache(llm: nn.Module) -> DynamicCache:
    """An empty cache for this model, with room in its full-attention layers."""
    cache = DynamicCache(config=llm.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache whose row i is row `rows[i]` of `cache`, which stays as it is. Only for `CacheKind.shareable` ones."""
    chosen = copy.copy(cache)
    chosen.layers = []
    for layer in cache.layers:
        if layer.get_seq_length() == 0:
            chosen.layers.append(copy.copy(layer))
        elif isinstance(layer, _RoomyLayer):
            chosen.layers.append(_RoomyLayer(layer.keys.index_select(0, rows), layer.values.index_select(0, rows)))
        else:
            twin = copy.copy(layer)  # tensors are replaced below, never written in place
            twin.keys, twin.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            chosen.layers.append(twin)
    return chosen


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


@torch.no_grad()
def decode_batch(
    llm: nn.Module,
    cache: DynamicCache,
    past: int,
    embeddings: Tensor,
    lengths: Sequence[int],
    ends: frozenset[int],
    max_new_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> list[Continued]:
    """Continue B rows greedily.

    Args:
        cache: of the `past` tokens in front of every row (B rows); it is used up.
        embeddings: (B, S, Dl), rows shorter than S with padding on the left.
        lengths: how many of the S tokens of each row are real; if all are, no mask is made.
        ends: token ids that end an answer.
        check: called before every token; raises to stop.
    """
    began = time.perf_counter()
    device, (rows, width) = embeddings.device, embeddings.shape[:2]
    pads = torch.tensor([width - length for length in lengths], device=device)
    mask: Tensor | None = None
    if bool(pads.any()):
        real = torch.arange(width, device=device) >= pads[:, None]
        mask = torch.cat([real.new_ones(rows, past), real], dim=1).long()
    positions = past + (torch.arange(width, device=device) - pads[:, None]).clamp(min=0)
    found = [Continued([], 0, 0.0) for _ in range(rows)]
    live = list(range(rows))
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    for step in range(max_new_tokens):
        check()
        logits = _next_logits(llm, inputs, mask, positions, cache)
        tokens, ties = _choose(logits)
        keep = []
        for place, (row, token, tied) in enumerate(zip(live, tokens.tolist(), ties, strict=True)):
            if row < 0:
                continue
            answer = found[row]
            answer.steps, answer.seconds, answer.tied = step + 1, time.perf_counter() - began, tied
            if token not in ends and not tied:
                answer.ids.append(token)
                keep.append(place)
            else:
                live[place] = -1
        if not keep or step + 1 == max_new_tokens:
            break
        positions = positions[:, -1:] + 1
        if 2 * len(keep) <= len(live):  # most rows are done: go on with the others alone
            index = torch.tensor(keep, device=device)
            cache, tokens, positions = select_rows(cache, index), tokens[index], positions[index]
            mask = None if mask is None else mask[index]
            live = [live[place] for place in keep]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        inputs = {"input_ids": tokens[:, None]}
    return found


@torch.no_grad()
def decode_alone(
    llm: nn.Module,
    embeddings: Tensor,
    ends: frozenset[int],
    max_new_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> Continued:
    """Continue one row (1, L, Dl) greedily, alone, with no mask and transformers' own cache: the reference answer."""
    began = time.perf_counter()
    answer = Continued([], 0, 0.0)
    cache = DynamicCache(config=llm.config)
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    for step in range(max_new_tokens):
        check()
        token = int(_choose(_next_logits(llm, inputs, None, positions, cache))[0])
        answer.steps, answer.seconds = step + 1, time.perf_counter() - began
        if token in ends:
            break
        answer.ids.append(token)
        positions = positions[:, -1:] + 1
        inputs = {"input_ids": torch.tensor([[token]], device=embeddings.device)}
    return answer


def _next_logits(
    llm: nn.Module, inputs: dict[str, Any], mask: Tensor | None, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """(B, V) logits behind the last token of each row."""
    more = {} if mask is None else {"attention_mask": mask}
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits: Tensor = llm(**inputs, **more, position_ids=positions, **options).logits
    return logits[:, -1]


def _choose(logits: Tensor) -> tuple[Tensor, list[bool]]:
    """The best token of each row, and whether it leads by less than rounding explains (never, in types without an entry).

    Raises:
        FloatingPointError: a row's best logit is not a number; nothing sensible can follow.
    """
    best = logits.float().topk(2, dim=-1)
    if not bool(torch.isfinite(best.values[:, 0]).all()):
        raise FloatingPointError(
            "the model gives logits that are not finite: its weights are damaged, or overflow in this precision"
        )
    share = TIE.get(logits.dtype)
    if share is None:
        return best.indices[:, 0], [False] * len(logits)
    largest = logits.abs().clamp(max=1e4).amax(dim=-1)  # a forbidden token's -inf is no scale
    return best.indices[:, 0], (best.values[:, 0] - best.values[:, 1] <= share * largest).tolist()
