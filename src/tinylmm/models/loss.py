"""Cross-entropy at supervised positions only, in chunks, so that no (tokens x vocabulary) tensor of a whole batch exists."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinylmm.models.llm import head_logits

CHUNK_TOKENS = 4096
"""Positions whose logits exist at once: 4096 x 51,200 fp32 values are 0.8 GiB for Phi-2."""


def supervised_cross_entropy(llm: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats, fp32) of S positions.

    Args:
        llm: causal LM whose output head is applied, with all that its own forward does to logits.
        hidden: (S, Dl) last hidden states at the supervised positions.
        targets: (S,) int64 token ids.
    """
    if hidden.shape[0] == 0:  # keeps head and hidden in the graph on a rank without supervised tokens
        return _chunk_loss(llm, hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    chunks = list(zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True))
    for part, target in chunks:
        if len(chunks) > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass, a chunk at a time
            total = total + checkpoint(_chunk_loss, llm, part, target, use_reentrant=False)
        else:
            total = total + _chunk_loss(llm, part, target)
    return total


def _chunk_loss(llm: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(llm, hidden), targets, reduction="sum")
