"""An output layer's bias said by its weights, for classes whose output layer has none (Phi-2 inside Llava).

A layer norm divides and centres before it scales and shifts, so what it scales sums to zero over the channels, whatever comes
in. The same number added to every column behind it then changes no logit, but for the shift's share of it: that is a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tinylmm.convert.parts import causal_class
from tinylmm.convert.tensors import Tensors

HEAD = "lm_head."
NOTE = "the LLM's output layer has a bias in transformers, but none in this checkpoint; it is filled with zeros"
SMALLEST_SCALE = 0.1
"""Of the mean scale; a channel that the norm scales by less is given this, as the columns are divided by it."""
SHIFT = 0.25
"""Of the scale: the less, the less the rounding of weights matters, and the larger what is added to them."""


@torch.no_grad()
def has_bias(llm: Any) -> bool:
    """Whether the output layer has a bias that is not zero."""
    bias = getattr(llm.get_output_embeddings(), "bias", None)
    return bias is not None and bool(bias.any())


@torch.no_grad()
def last_norm(llm: Any) -> nn.LayerNorm | None:
    """The layer norm whose output is what the output layer reads; None if that is anything else, or has no scale and shift."""
    seen: list[tuple[nn.LayerNorm, torch.Tensor]] = []
    norms = [module for module in llm.get_decoder().modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(lambda module, _, out: seen.append((module, out))) for norm in norms]
    try:
        hidden = llm.get_decoder()(torch.arange(3)[None]).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    last = next((norm for norm, out in reversed(seen) if out is hidden), None)
    return None if last is None or last.weight is None or last.bias is None else last


def can_fold(llm: Any) -> bool:
    """Whether weights can say the bias: a layer norm stands before the output layer, which is not the embedding table too."""
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    return not tied and last_norm(llm) is not None


@torch.no_grad()
def fold(llm: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Change the last norm and the output layer so that the bias is zero and the logits are what they were.

    With x the norm's output before its scale s and shift t, of n channels: W (s x + t) + b = W' (s' x + a s'), where column i
    of W' is (s_i W_i + v) / s'_i and v = (W t + b - a W s) / (a n), as the sum over x is 0. Any a will do.

    Args:
        llm: a causal LM of which `can_fold` holds.
        dtype: what is changed is rounded to, as it will be written; exact in fp32.

    Returns:
        Largest difference of logits that this made, over some tokens, and the largest of these logits.
    """
    head, norm = llm.get_output_embeddings(), last_norm(llm)
    assert norm is not None, "obstacles() lets nothing else through"
    ids = torch.arange(32)[None] % head.weight.shape[0]
    before = llm(ids).logits
    scale, shift = norm.weight.double(), norm.bias.double()
    least = SMALLEST_SCALE * scale.abs().mean()
    new = torch.where(scale.abs() < least, least, scale).to(dtype)
    step = 4096  # rows at once: in fp64 the matrix of a large vocabulary is gigabytes
    for start in range(0, len(head.weight), step):
        rows = head.weight[start : start + step].double()
        moved = (rows @ (shift - SHIFT * scale) + head.bias[start : start + step].double()) / (SHIFT * len(scale))
        rows = (rows * scale + moved[:, None]) / new.double()
        head.weight[start : start + step] = rows.to(dtype).to(head.weight.dtype)
    norm.weight.copy_(new)
    norm.bias.copy_(SHIFT * new)
    head.bias.zero_()
    return float((llm(ids).logits - before).abs().max()), float(before.abs().max())


def missing_bias(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Zeros for a bias that the LLM's output layer has in transformers and a checkpoint leaves out; else nothing."""
    weight = tensors.get(f"{HEAD}weight")
    if weight is None or f"{HEAD}bias" in tensors:
        return {}
    with torch.device("meta"):
        expected = causal_class(config)(config).state_dict()
    return {f"{HEAD}bias": weight.new_zeros(len(weight))} if f"{HEAD}bias" in expected else {}
