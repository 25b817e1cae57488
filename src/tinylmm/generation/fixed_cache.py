"""Keys and values in rooms of one size, and the attention of rows to the prefix of their group and to their own tokens.

Shapes: I groups of R rows (B = I R), K key-value heads each with Q query heads, E a head's width, T new tokens a row, P columns
of a group's shared prefix, C columns of a row's own. What P leaves over of a prefix stands in the first of a row's own columns,
so that the shared columns need no mask. Column c of a row's own is position P + c; the last one takes what padding writes, and
nobody reads it.

A softmax over both parts is put together from two: with sums of exponentials e^a and e^b and means x and y, the whole mean is
(e^a x + e^b y) / (e^a + e^b) (as FlashAttention joins its blocks, T. Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IN_FIXED_ROOMS = "tinylmm_fixed"
"""Name under which transformers knows `_attend_rooms`."""
KERNEL_MULTIPLE, KERNEL_MOST = 8, 256
"""Head widths that PyTorch's attention kernels take: multiples of the one, up to the other."""


@dataclass(frozen=True, order=True)
class Shape:
    """Of everything that a step computes: I, R, P and C of the module's docstring."""

    groups: int
    rows: int
    shared: int
    own: int

    @property
    def all_rows(self) -> int:
        """B."""
        return self.groups * self.rows

    @property
    def tokens(self) -> int:
        """Places for tokens in the cache."""
        return self.groups * self.shared + self.all_rows * self.own


class Layout:
    """Where the new tokens of the step at hand stand, and who sees what; the same for all layers.

    Attributes:
        seen: (B, T) int64, the own column of each new token, 0 of padding.
        written: (B, T) int64, the same, and the last column of padding.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.lines = torch.arange(shape.all_rows, device=device)[:, None]
        self._columns = torch.arange(shape.own, device=device)
        self._places = torch.arange(shape.shared, device=device)
        self._biases: dict[tuple[str, int, int | None], Tensor] = {}
        self.seen = self.written = torch.zeros_like(self.lines)

    def place(self, columns: Tensor, counts: Tensor, width: int) -> None:
        """Lay out a step.

        Args:
            columns: (B,) own columns that are taken.
            counts: (B,) how many of the `width` new tokens are real; padding stands in front of them.
        """
        offsets = torch.arange(width, device=self.device) - (width - counts[:, None])
        real, at = offsets >= 0, columns[:, None] + offsets
        self.seen = at.where(real, torch.zeros_like(at))
        self.written = at.where(real, torch.full_like(at, self.shape.own - 1))
        self._biases = {}

    def own_bias(self, heads: int, window: int | None) -> Tensor:
        """(B, 1, heads * T, C), 0 where a new token sees an own column, else far below any score."""
        key = ("own", heads, window)
        if key not in self._biases:
            seen = self._columns <= self.seen[..., None]
            if window is not None:
                seen &= self._columns > self.seen[..., None] - window
            self._biases[key] = self._bias(seen)[:, None].expand(-1, heads, -1, -1).flatten(1, 2)[:, None]
        return self._biases[key]

    def shared_bias(self, heads: int, window: int | None) -> Tensor | None:
        """(I, 1, R * heads * T, P), as `own_bias`; None where all new tokens see all of it."""
        if window is None:
            return None
        key = ("shared", heads, window)
        if key not in self._biases:
            bias = self._bias(self._places > self.shape.shared + self.seen[..., None] - window)
            grouped = bias.unflatten(0, (self.shape.groups, self.shape.rows))
            self._biases[key] = grouped[:, :, None].expand(-1, -1, heads, -1, -1).flatten(1, 3)[:, None]
        return self._biases[key]

    def _bias(self, seen: Tensor) -> Tensor:
        lowest = torch.finfo(self.dtype).min / 2  # half of it, so that a score beside it cannot overflow
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill(~seen, lowest)


class _RoomLayer(DynamicLayer):
    """One layer's rooms: `shared_keys` and `shared_values` (I, K, P, E), `keys` and `values` (B, K, C, E)."""

    keys: Tensor
    values: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.shared_keys = self.shared_values = torch.empty(0)

    def make_room(self, keys: Tensor, values: Tensor) -> None:
        """Make the rooms where there are none yet, for keys and values like these (..., K, n, E)."""
        if self.is_initialized:
            return
        self.lazy_initialization(keys, values)
        shape, heads = self.layout.shape, keys.shape[-3]
        # zeros: 0 times what lay there may be NaN
        self.keys, self.values = (s.new_zeros(shape.all_rows, heads, shape.own, s.shape[-1]) for s in (keys, values))
        self.shared_keys, self.shared_values = (
            s.new_zeros(shape.groups, heads, shape.shared, s.shape[-1]) for s in (keys, values)
        )

    def load(self, groups: slice, keys: Tensor, values: Tensor) -> None:
        """Put a prefix (1, K, n, E) in front of the rows of some groups."""
        self.make_room(keys, values)
        shape = self.layout.shape
        rows = slice(groups.start * shape.rows, groups.stop * shape.rows)
        left = keys.shape[2] - shape.shared
        for shared, own, states in (
            (self.shared_keys, self.keys, keys),
            (self.shared_values, self.values, values),
        ):
            shared[groups] = states[:, :, : shape.shared]
            own[rows, :, :left] = states[:, :, shape.shared :]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Nothing is to be made of it: positions and mask are given."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new keys and values (B, K, T, E); returns this layer in place of keys and values, for `_attend_rooms`."""
        self.make_room(key_states, value_states)
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room[self.layout.lines, :, self.layout.written] = states.transpose(1, 2)
        return self, self


class FixedCache:
    """All layers' rooms.

    Attributes:
        cache: what the model is given.
    """

    def __init__(self, llm: nn.Module, layout: Layout) -> None:
        self.cache = DynamicCache(config=llm.config)
        self._layers = [_RoomLayer(layout) for _ in self.cache.layers]
        self.cache.layers = list(self._layers)

    def load(self, groups: slice, prefix: DynamicCache) -> None:
        """Put a prefix that was computed before (one row) in front of the rows of some groups."""
        for layer, held in zip(self._layers, prefix.layers, strict=True):
            layer.load(groups, held.keys, held.values)


def _attend_rooms(
    module: nn.Module,
    query: Tensor,
    key: _RoomLayer,
    value: _RoomLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the shared prefix and to a row's own columns: heads (B, K Q, T, E), the result (B, T, K Q, E).

    `key` is the layer; the mask is the layout's, whatever is given.
    """
    layer, shape = key, key.layout.shape
    count, heads = query.shape[2], query.shape[1] // layer.keys.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = query.unflatten(1, (-1, heads))  # (B, K, Q, T, E)
    bias = layer.layout.own_bias(heads, sliding_window)
    mixed, weight = attend(split.flatten(2, 3), layer.keys, layer.values, bias, scale, softcap)
    if shape.shared:
        grouped = split.unflatten(0, (shape.groups, shape.rows)).transpose(1, 2).flatten(2, 4)  # (I, K, R Q T, E)
        prefix_bias = layer.layout.shared_bias(heads, sliding_window)
        theirs, their_weight = attend(grouped, layer.shared_keys, layer.shared_values, prefix_bias, scale, softcap)
        theirs, their_weight = (_by_rows(found, shape.rows) for found in (theirs, their_weight[..., None]))
        share = torch.sigmoid(their_weight - weight[..., None])
        mixed = torch.lerp(mixed.to(share.dtype), theirs.to(share.dtype), share)
    mixed = mixed.to(query.dtype).unflatten(2, (heads, count))
    return mixed.flatten(1, 2).transpose(1, 2).contiguous(), None


def _by_rows(grouped: Tensor, rows: int) -> Tensor:
    """(I, K, R n, E) to (I R, K, n, E)."""
    return grouped.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each query's sum of exponentials.

    Args:
        query: (B, K, N, E).
        key, value: (B, K, M, E).
        bias: (B, 1, N, M), added to the scores.
        cap: scores are cap * tanh(score / cap) where it is given (Gemma 2).

    Returns:
        (B, K, N, E) in the type of the query, and (B, K, N) in fp32 (fp64 if the query is).
    """
    width = query.shape[-1]
    fits = query.is_cuda and width == value.shape[-1] and width % KERNEL_MULTIPLE == 0 and width <= KERNEL_MOST
    if fits and cap is None and query.dtype != torch.float64:
        if bias is None and query.dtype != torch.float32:
            flash = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
            return flash[0], flash[1][..., : query.shape[2]]
        if bias is not None:
            bias = bias.expand(-1, query.shape[1], -1, -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
        return efficient[0], efficient[1][..., : query.shape[2]]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-1, -2)) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(-1)
    mixed = torch.matmul(torch.exp(scores - total[..., None]), value.to(wide))
    return mixed.to(query.dtype), total


ALL_ATTENTION_FUNCTIONS.register(IN_FIXED_ROOMS, _attend_rooms)
ALL_MASK_ATTENTION_FUNCTIONS.register(IN_FIXED_ROOMS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
