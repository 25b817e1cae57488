"""Cross-entropy at supervised positions only, in chunks, so that no (tokens x vocabulary) tensor of a whole batch exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinylmm.models.fused_loss import can_fuse, fused_cross_entropy
from tinylmm.models.llm import head_logits, shaping_of

CHUNK_TOKENS = 4096
"""Positions whose logits exist at once where head and loss cannot be one: 0.8 GiB for Phi-2's 51,200 words in fp32."""


_RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}
"""No check of shapes: ZeRO-3 has let go of a frozen head's weights again, which then have none, when it looks."""


def num_chunks(tokens: int) -> int:
    """How many times the output head is run for so many supervised positions: once at least."""
    return max(1, -(-tokens // CHUNK_TOKENS))


def supervised_cross_entropy(llm: nn.Module, hidden: Tensor, targets: Tensor, chunks: int | None = None) -> Tensor:
    """Return the summed cross-entropy (nats, fp32) of S positions.

    Args:
        llm: causal LM whose output head is applied, with all that its own forward does to logits.
        hidden: (S, Dl) last hidden states at the supervised positions.
        targets: (S,) int64 token ids.
        chunks: how often the head is run, where all ranks must agree on it; at least `num_chunks(S)`. Chunks without a
            position keep head and hidden in the graph. By default head and loss are one, where the head lets them
            (`models/fused_loss.py`).
    """
    head = llm.get_output_embeddings()  # type: ignore[operator]
    if chunks is None and can_fuse(head):
        return fused_cross_entropy(head, shaping_of(llm), hidden, targets)
    chunks = num_chunks(len(targets)) if chunks is None else chunks
    total = hidden.new_zeros((), dtype=torch.float32)
    for number in range(chunks):
        here = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
        if chunks > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass, a chunk at a time
            total = total + checkpoint(_chunk_loss, llm, hidden[here], targets[here], **_RECOMPUTED)
        else:
            total = total + _chunk_loss(llm, hidden[here], targets[here])
    return total


def _chunk_loss(llm: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(llm, hidden), targets, reduction="sum")
