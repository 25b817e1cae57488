"""Output head and cross-entropy in one, a chunk of positions at a time: its gradients are made with the loss.

Logits of a chunk are dropped before the next one's are made, so that neither the forward nor the backward pass ever holds a
(positions x vocabulary) tensor of a whole batch, and the head is multiplied once, where recomputing would do it twice. The
idea is Liger's (arXiv 2410.10989, section 3.2) and cut cross-entropy's (arXiv 2411.09009); this is plain PyTorch, for any
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylmm.models.prepacked import Prepacked, prepacked

CHUNK_BYTES = 128 * 2**20
"""Of a chunk's logits in fp32: 655 positions of Phi-2's 51,200 words."""


@dataclass(frozen=True)
class Shaping:
    """What a causal LM does to its head's output: a factor (Cohere, Granite), then a soft cap (Gemma 2)."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Shape logits (S, V)."""
        logits = logits if self.factor == 1.0 else logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, gradient: Tensor, shaped: Tensor) -> Tensor:
        """From the gradient of shaped logits to that of the head's output, in place."""
        if self.cap is not None:
            gradient.mul_(1.0 - (shaped / self.cap) ** 2)
        return gradient if self.factor == 1.0 else gradient.mul_(self.factor)


def compute_type(head: nn.Linear) -> torch.dtype:
    """In what a head multiplies: autocast's type, or its own."""
    kind = head.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype


def can_fuse(head: Any) -> bool:
    """Whether the head is nothing but a product with weights that are whole, in a type whose gradients need no scaling."""
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    return plain and not hasattr(head.weight, "ds_id") and compute_type(head) != torch.float16


def fused_cross_entropy(
    head: nn.Linear, shaping: Shaping, hidden: Tensor, targets: Tensor, rows: int | None = None
) -> Tensor:
    """Return the summed cross-entropy (nats, fp32) of S positions.

    Args:
        head: the output head, see `can_fuse`.
        shaping: of its logits.
        hidden: (S, D).
        targets: (S,) int64.
        rows: positions whose logits exist at once; by default what CHUNK_BYTES hold.
    """
    rows = rows or max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    compute = compute_type(head)
    laid_out = prepacked(head) if compute == torch.float32 else None
    return _FusedCrossEntropy.apply(hidden, head.weight, head.bias, targets, shaping, rows, compute, laid_out)


class _FusedCrossEntropy(torch.autograd.Function):
    """Gradients are those of a sum whose own gradient is 1; the backward pass multiplies them by what comes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        rows: int,
        compute: torch.dtype,
        laid_out: Prepacked | None,
    ) -> Tensor:
        """See `fused_cross_entropy`."""
        wanted = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        slopes = _Slopes(hidden, weight, bias, wanted, laid_out)
        narrow = weight.detach().to(compute)
        offset = None if bias is None else bias.detach().to(compute)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), rows):
                here = slice(first, first + rows)
                seen = hidden[here].detach().to(compute)
                raw = F.linear(seen, narrow, offset).float() if laid_out is None else laid_out.ahead(seen)
                shaped = shaping(raw)
                del raw
                gradient = F.log_softmax(shaped, dim=-1)
                wanted_words = targets[here].unsqueeze(1)
                total -= gradient.gather(1, wanted_words).sum()
                if any(wanted):
                    gradient.exp_().scatter_add_(1, wanted_words, gradient.new_full(wanted_words.shape, -1.0))
                    slopes.add(here, shaping.backward(gradient, shaped).to(compute), seen, narrow)
                del shaped, gradient
        ctx.slopes = slopes.made()
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """Multiply what the forward pass has made, where it lies: nobody else holds it."""
        found = [None if slope is None else slope.mul_(outer.to(slope.dtype)) for slope in ctx.slopes]
        ctx.slopes = None
        return (*found, None, None, None, None, None)


class _Slopes:
    """Gradients of hidden states (S, D), head (V, D) and bias (V,) as the chunks add to them."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], laid_out: Prepacked | None
    ) -> None:
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Of several chunks in fp32, which is where plain gradients are summed too.
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        self._types, self._laid_out = (hidden.dtype, weight.dtype), laid_out

    def add(self, here: slice, gradient: Tensor, seen: Tensor, weight: Tensor) -> None:
        """Add a chunk's share: gradient (rows, V) of its logits."""
        if self.hidden is not None:
            self.hidden[here] = gradient @ weight if self._laid_out is None else self._laid_out.back(gradient)
        if self.weight is not None and gradient.dtype == torch.float32:
            self.weight.addmm_(gradient.t(), seen)
        elif self.weight is not None:
            self.weight += gradient.t() @ seen
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=torch.float32)

    def made(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All of them, in the types of what they are gradients of."""
        narrow = [None if slope is None else slope.to(self._types[1]) for slope in (self.weight, self.bias)]
        return self.hidden, narrow[0], narrow[1]
