"""Less elementwise work: activations and norms of transformers' models in fewer passes over memory, with the same numbers.

`fuse` looks at every module of a model by what it computes, not by its name alone: a norm is taken over only if the one that
takes its place gives the same output, on the spot, for numbers drawn at random.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from tinylmm.models.rotary import turn_faster

log = logging.getLogger(__name__)

TANH_GELUS = tuple({ACT2CLS[name] for name in ("gelu_new", "gelu_fast")})
"""Modules that compute the tanh form of GELU one operation after another; Phi-2's is the first."""
TOLERANCE = 1e-6
"""Largest difference of a norm's output that counts as rounding (fp32, for inputs of about 1)."""
FEED_FORWARD = ("mlp", "ffn", "feed_forward")
PROJECTIONS = ("q_proj", "o_proj", "out_proj", "dense")
"""Names that transformers' blocks have for their feed-forward network, and their attention for what makes its queries and its
output; no other position reads a query."""
NEEDED = "needed_only"
"""Attribute of an attention module that is told which positions are read."""
TRIED = (3, 16.0)
"""Rows that a norm is tried on, and how far they are stretched."""


def fuse(model: nn.Module, on_cpu: bool) -> dict[str, int]:
    """Give a model's modules their fused forms, and return how many of which kind there are.

    Args:
        model: any module; its parameters and the names of its modules stay as they are.
        on_cpu: root-mean-square norms and rotary embeddings too, which are compiled or have kernels of their own on a GPU.
    """
    counts = {"gelu": 0, "rms_norm": 0, "rotary": 0}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TANH_GELUS):
                setattr(parent, name, nn.GELU(approximate="tanh"))
                counts["gelu"] += 1
            elif on_cpu and _is_rms_norm(child):
                child.forward = _RMSForward(child)
                counts["rms_norm"] += 1
            elif on_cpu and turn_faster(child):
                counts["rotary"] += 1
    log.debug("fused: %s", counts)
    return counts


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is x / sqrt(mean(x^2) + eps) times its weight, tried on a few rows."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if eps is None or weight is None or weight.dim() != 1 or weight.dtype != torch.float32 or weight.is_meta:
        return False
    if isinstance(getattr(module, "forward", None), _RMSForward):
        return False
    made = torch.Generator().manual_seed(0)
    rows, stretch = TRIED
    tried = torch.randn(rows, len(weight), generator=made) * torch.linspace(1 / stretch, stretch, rows)[:, None]
    with torch.no_grad():
        expected, found = module(tried.to(weight.device)), rms_norm(tried.to(weight.device), weight, float(eps))
    return bool(((found - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)).all())


class _RMSForward:
    """A norm's `forward`; an object of its own, so that it can be copied and told from others."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight: Any = self.module.weight
        if hidden_states.dtype != torch.float32 or weight.dtype != torch.float32:
            return type(self.module).forward(self.module, hidden_states)
        return rms_norm(hidden_states, weight, float(self.module.variance_epsilon))  # type: ignore[arg-type]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (B. Zhang and R. Sennrich, arXiv 1910.07467)."""
    return _RMSNorm.apply(hidden, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row, where plain autograd keeps three tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `rms_norm`."""
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """d(x s w) with s = (mean(x^2) + eps)^-1/2."""
        hidden, weight, scale = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.einsum("nd,nd->d", outer.flatten(0, -2), (hidden * scale).flatten(0, -2))
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        inner = outer * weight
        along = torch.linalg.vecdot(inner, hidden).unsqueeze_(-1)
        factor = along.mul_(scale.pow(3)).div_(-hidden.shape[-1])
        return inner.mul_(scale).addcmul_(hidden, factor), of_weight, None


class NeededOnly:
    """Lets position-wise modules of the last block compute at those positions alone whose hidden states are read.

    Behind the last attention no position sees another: of what comes out for the others, nothing reaches the loss, and their
    queries find nothing that is read.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        """(S,) int64 in rows laid end to end; None computes all. It stays until it is set again: checkpointed blocks run in the
        backward pass too."""

    def take(self, modules: list[nn.Module], attentions: list[nn.Module]) -> None:
        """Take modules over that map (..., D) to (..., D') position by position, and let attentions know what is read."""
        for module in modules:
            module.forward = _AtPositions(self, module)
        for attention in attentions:
            setattr(attention, NEEDED, self)


def positions_read(attention: nn.Module) -> Tensor | None:
    """(S,) int64, the positions whose results are read of this attention, in training; None is all."""
    needed = getattr(attention, NEEDED, None)
    return needed.positions if needed is not None and attention.training else None


class _AtPositions:
    """A position-wise module's `forward` at some of the positions; zeros come out at the others."""

    def __init__(self, needed: NeededOnly, module: nn.Module) -> None:
        self.needed, self.module, self.inner = needed, module, module.forward

    def __call__(self, hidden: Tensor) -> Tensor:
        positions, count = self.needed.positions, hidden.shape[:-1].numel()
        if positions is None or not self.module.training or len(positions) == count:
            return self.inner(hidden)
        out: Tensor = self.inner(hidden.flatten(0, -2).index_select(0, positions))
        return out.new_zeros((count, out.shape[-1])).index_copy(0, positions, out).view(*hidden.shape[:-1], -1)


def position_wise(block: nn.Module) -> list[nn.Module]:
    """What of a transformer block computes each position from itself alone, for itself, and drops nothing at random.

    Those are its queries and what is behind its attention.
    """
    found = [child for name, child in block.named_children() if name in FEED_FORWARD]
    named = (pair for child in attentions_of(block) for pair in child.named_modules())
    found += [module for name, module in named if name.rpartition(".")[2] in PROJECTIONS]
    return [module for module in found if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())]


def attentions_of(block: nn.Module) -> list[nn.Module]:
    """What of a transformer block is made of parts and no feed-forward network."""
    return [child for name, child in block.named_children() if name not in FEED_FORWARD and list(child.children())]
