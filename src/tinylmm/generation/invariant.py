"""Computation whose result for a row does not depend on the rows beside it, so that narrow types keep the engine's promise.

In bf16 two things let a row's logits change with its batch. A linear layer picks its kernel by the number of rows: here it
takes them in blocks of one size wherever its kernels do not agree. And attention adds up in an order that depends on the
columns there are, padding and other questions among them: here it adds in fp64, whose rounding is far below what a narrow type
can hold. Images go through the tower one at a time. All of it costs time, so it is asked for and no default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinylmm.models.attention import caps_scores
from tinylmm.models.lmm import LMM

IN_DOUBLE = "tinylmm_in_double"
"""Name under which transformers knows `_attend_in_double`."""
BLOCK = 64
"""Rows that a linear layer takes at once."""
TRIED_ROWS = (1, 2, 7, 20, BLOCK, 3 * BLOCK)
"""Numbers of rows with which a linear layer is tried: does each row come out as beside others?"""


def can_be_invariant(model: LMM) -> bool:
    """Whether the LLM's attention can be done in fp64: not with capped scores (Gemma 2), nor where a class has its own."""
    llm = cast(PreTrainedModel, model.llm)
    return bool(llm._supports_sdpa) and not caps_scores(llm.config)


@contextmanager
def invariant_rows(model: LMM) -> Iterator[None]:
    """Let LLM and connector compute each row as if it were alone, for as long as this lasts.

    Raises:
        ValueError: the LLM's attention has no such form (`can_be_invariant`).
    """
    if not can_be_invariant(model):
        raise ValueError(f"{type(model.llm).__name__} caps its attention scores or has an attention of its own")
    llm = cast(PreTrainedModel, model.llm)
    before = llm.config._attn_implementation
    tried: dict[tuple[Any, ...], bool] = {}
    blocked = []
    for layer in [*llm.modules(), *model.connector.modules()]:
        if type(layer) is nn.Linear:
            weight = layer.weight
            kind = (weight.shape, weight.dtype, weight.device, layer.bias is None)
            if kind not in tried:
                tried[kind] = rows_agree(layer)
            if not tried[kind]:
                blocked.append(layer)
    llm.set_attn_implementation(IN_DOUBLE)
    for layer in blocked:
        layer.forward = partial(_in_blocks, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in blocked:
            del layer.forward
        llm.set_attn_implementation(before)


@torch.no_grad()
def rows_agree(layer: nn.Linear) -> bool:
    """Whether a linear layer gives each row the same bits, however many others are beside it."""
    generator = torch.Generator(layer.weight.device).manual_seed(0)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    rows = torch.randn(max(TRIED_ROWS), layer.in_features, generator=generator, **like)  # type: ignore[call-overload]
    whole = F.linear(rows, layer.weight, layer.bias)
    return all(torch.equal(F.linear(rows[:n], layer.weight, layer.bias), whole[:n]) for n in TRIED_ROWS)


def _in_blocks(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """A linear layer of (..., K), BLOCK rows at a time, the last block filled up with zeros: one shape, one kernel."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    rows = F.pad(rows, (0, 0, 0, -len(rows) % BLOCK))
    done = torch.cat([F.linear(block, layer.weight, layer.bias) for block in rows.split(BLOCK)])
    count = inputs.shape[:-1].numel()
    return done[:count].reshape(*inputs.shape[:-1], -1)


def _attend_in_double(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in fp64, as transformers calls it: heads (B, H, L, E), the result (B, L, H, E) in their type."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    causal = mask is None and query.shape[2] > 1
    mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
    return mixed.to(query.dtype).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IN_DOUBLE, _attend_in_double)
ALL_MASK_ATTENTION_FUNCTIONS.register(IN_DOUBLE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
