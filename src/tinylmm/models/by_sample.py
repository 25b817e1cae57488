"""Causal attention of samples end to end, one sample after another, where no kernel takes them together: on a CPU above all.

Rows of short samples are attended to in blocks of queries, each against all keys before it, as products over all heads at once:
up to a few hundred positions that takes a fifth to a third less time than PyTorch's kernel, which works in smaller pieces
(measured with 8 and 32 heads of 64 and 80, on one and two cores). Longer samples are that kernel's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Queries that are attended for at once."""
LONGEST = 512
"""Positions up to which a sample counts as short: the scores of a block and all its heads then stay in a core's cache."""
NARROWEST = 512
"""Heads times their size from which blocks pay: below, a product takes less time than calling it."""
EXACT = (torch.float32, torch.float64)
"""What products of half types would round, PyTorch's kernel keeps."""


@torch.compiler.disable  # how many samples there are, and of what lengths, decides what is computed
def attend_sample_by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float | None,
    window: int | None,
    needed: Tensor | None = None,
) -> Tensor:
    """`models/varlen.attend_samples` without a kernel for it; zeros may come out at positions that are not needed."""
    lengths: list[int] = bounds.diff().tolist()
    skipped = [0] * len(lengths) if needed is None else _before(needed, bounds)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    fits = max(lengths, default=0) <= LONGEST and query.shape[1] * query.shape[2] >= NARROWEST
    if fits and _exact_on_a_cpu(query, key, value):
        window = None if window is None or window >= LONGEST else window
        mixed: Tensor = _InBlocks.apply(query, key, value, _plan(lengths, skipped, window), scale, window)
        return mixed
    pieces = []
    # split, whose backward pass puts all gradients together at once, where slices would each write one of the whole row
    for q, k, v, first in zip(query.split(lengths), key.split(lengths), value.split(lengths), skipped, strict=True):
        if first:
            pieces.append(q.new_zeros((first, *q.shape[1:])))
        if len(q) > first:
            pieces.append(_attend_one(q[first:] if first else q, k, v, scale, window))
    return torch.cat(pieces)


def _exact_on_a_cpu(*heads: Tensor) -> bool:
    """Whether products keep what they are given: autocast would round it, and cast for SDPA alone what differs in type."""
    alike = len({one.dtype for one in heads}) == 1 and heads[0].dtype in EXACT
    return alike and heads[0].device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _before(needed: Tensor, bounds: Tensor) -> list[int]:
    """Positions of each sample before the first one that is needed; `needed` is in ascending order."""
    starts, ends = bounds[:-1].long(), bounds[1:].long()
    following = torch.cat([needed, ends[-1:]])[torch.searchsorted(needed, starts)]
    skipped: list[int] = (torch.minimum(following, ends) - starts).tolist()
    return skipped


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """(L', H, E), of a sample's last L' queries over its L keys and values (L, K, E)."""
    queries, keys = len(query), len(key)
    seen: dict[str, Any] = {"is_causal": True}
    if queries < keys or (window is not None and keys > window):
        band = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        seen = {"attn_mask": band if window is None else band.triu(keys - queries + 1 - window)}
    heads = [part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=scale, enable_gqa=grouped, **seen)
    return out.squeeze(0).transpose(0, 1)


# ------------------------------------------------------------------------------------------------ in blocks

Plan = list[tuple[int, int, int]]
"""Of each block of queries where its keys begin, where it begins, and where both end."""


def _plan(lengths: list[int], skipped: list[int], window: int | None) -> Plan:
    plan, start = [], 0
    for length, first in zip(lengths, skipped, strict=True):
        for begin in range(first, length, BLOCK):
            oldest = 0 if window is None else max(0, begin + 1 - window)
            plan.append((start + oldest, start + begin, start + min(begin + BLOCK, length)))
        start += length
    return plan


@lru_cache(maxsize=4)
def _band(window: int | None, dtype: torch.dtype) -> Tensor:
    """(BLOCK, LONGEST + BLOCK): 0 where a query sees a key, -inf elsewhere, query i being at column LONGEST + i."""
    seen = torch.ones(BLOCK, LONGEST + BLOCK, dtype=torch.bool).tril(LONGEST)
    if window is not None:
        seen = seen.triu(LONGEST + 1 - window)
    return torch.where(seen, 0.0, -math.inf).to(dtype)


class _InBlocks(torch.autograd.Function):
    """Keeps queries, keys and values, and computes scores again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None
    ) -> Tensor:
        """See `attend_sample_by_sample`: heads (N, H, E) and (N, K, E)."""
        q, k, v = (heads.transpose(0, 1).contiguous() for heads in (query, key, value))
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        out = query.new_zeros(query.shape)
        for oldest, begin, end in plan:
            shares = _shares(_grouped(q, k, begin, end), k[:, oldest:end], end - begin, scale, window)
            out[begin:end] = torch.bmm(shares, v[:, oldest:end]).view(len(q), end - begin, -1).transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """Of softmax(q k^T) v, block by block."""
        q, k, v = ctx.saved_tensors
        scale, slopes = ctx.scale, outer.transpose(0, 1).contiguous()
        of_q, of_k, of_v = (torch.zeros_like(heads) for heads in (q, k, v))
        for oldest, begin, end in ctx.plan:
            keys, size = slice(oldest, end), end - begin
            asked, slope = _grouped(q, k, begin, end), _grouped(slopes, k, begin, end)
            shares = _shares(asked, k[:, keys], size, scale, ctx.window)
            of_v[:, keys].add_(torch.bmm(shares.transpose(1, 2), slope))  # baddbmm into a slice goes head by head
            of_shares = torch.bmm(slope, v[:, keys].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_k[:, keys].add_(torch.bmm(of_scores.transpose(1, 2), asked), alpha=scale)
            of_q[:, begin:end] = torch.bmm(of_scores, k[:, keys]).mul_(scale).view(len(q), size, -1)
        return of_q.transpose(0, 1), of_k.transpose(0, 1), of_v.transpose(0, 1), None, None, None


def _grouped(heads: Tensor, keys: Tensor, begin: int, end: int) -> Tensor:
    """(H, N, E) at some positions, those that share a key head together: (K, H / K * positions, E)."""
    return heads[:, begin:end].reshape(len(keys), -1, heads.shape[-1])


def _shares(query: Tensor, key: Tensor, size: int, scale: float, window: int | None) -> Tensor:
    """(K, G * size, k), what each query takes of each value: the last `size` of k positions, G queries each, over all keys."""
    heads, keys = key.shape[:2]
    start = LONGEST - (keys - size)
    band = _band(window, query.dtype)[:size, start : start + keys]
    each = band.expand(heads, query.shape[1] // size, size, keys).reshape(heads, -1, keys)
    return torch.softmax(torch.baddbmm(each, query, key.transpose(1, 2), alpha=scale), -1)
