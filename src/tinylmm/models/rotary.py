"""Rotary position embeddings in half the passes over memory, with the same numbers.

transformers' attention modules call a function of their own file, which negates, joins, multiplies twice and adds, and whose
gradient is written into zeros piece by piece. Where theirs is found to compute what `turned` computes, by trying it, a
module's `forward` runs with ours in its place; the file's own function stays as it is for every other model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
"""What transformers' files call the function."""
TOLERANCE = 1e-6
"""Largest difference that counts as rounding (fp32, for inputs of about 1)."""
TRIED = (2, 3, 5, 8)
"""Rows, heads, positions and head dimension that a function is tried on."""


def turn_faster(module: nn.Module) -> bool:
    """Let an attention module turn its queries and keys by `turned`; False where it has no such function that agrees."""
    plain = type(module).forward
    if not isinstance(plain, FunctionType) or NAME not in plain.__code__.co_names:
        return False
    theirs = plain.__globals__.get(NAME)
    if theirs is None or "forward" in vars(module) or not _agrees(theirs):
        return False
    module.forward = _Turning(module, theirs)
    return True


class _Turning:
    """An attention's own `forward`, but for one function; an object of its own, so that it can be copied."""

    def __init__(self, module: nn.Module, theirs: Callable[..., Any]) -> None:
        self.module, self.theirs = module, theirs

    def __call__(self, *values: Any, **named: Any) -> Any:
        plain: Any = type(self.module).forward
        if torch.compiler.is_compiling():
            return plain(self.module, *values, **named)
        names = plain.__globals__ | {NAME: self.both}
        own = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        own.__kwdefaults__ = plain.__kwdefaults__
        return own(self.module, *values, **named)

    def both(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        """Queries and keys (..., H, N, E), turned by cos and sin (..., N, E)."""
        alike = query.dtype == key.dtype == cos.dtype == sin.dtype == torch.float32
        if more or named or not alike or cos.requires_grad or sin.requires_grad:
            return self.theirs(query, key, cos, sin, *more, **named)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return turned(query, cos, sin), turned(key, cos, sin)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (x1, x2), half a head apart, by their angles: (x1 c - x2 s, x2 c + x1 s).

    J. Su et al., arXiv 2104.09864, section 3.2.2, with pairs laid out as GPT-NeoX has them.

    Args:
        heads: (..., H, N, E).
        cos, sin: (..., E), of the angles; broadcast, without gradients.
    """
    out: Tensor = _Turned.apply(heads, cos, sin)
    return out


class _Turned(torch.autograd.Function):
    """Keeps nothing of its input.

    What comes out lies head by head, as attention reads it, and what goes back position by position, as projections wrote it.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `turned`."""
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, -1)
        return _combined(heads, cos, low, high, -1, torch.empty_like(heads, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """Turned back."""
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, -1)
        *rows, heads, positions, size = outer.shape
        out = outer.new_empty(*rows, positions, heads, size).transpose(-2, -3)
        return _combined(outer, cos, high, low, 1, out), None, None


def _combined(heads: Tensor, cos: Tensor, of_high: Tensor, of_low: Tensor, sign: int, out: Tensor) -> Tensor:
    """Write heads * cos, and to its halves sign * x2 * of_high and -sign * x1 * of_low."""
    low, high = heads.chunk(2, -1)
    torch.mul(heads, cos, out=out)
    first, second = out.chunk(2, -1)
    first.addcmul_(high, of_high, value=sign)
    second.addcmul_(low, of_low, value=-sign)
    return out


def _agrees(theirs: Callable[..., Any]) -> bool:
    """Whether a function turns as `turned` does, tried on a few numbers."""
    made = torch.Generator().manual_seed(0)
    rows, _, positions, size = TRIED
    query, key = (torch.randn(*TRIED, generator=made) for _ in range(2))
    cos, sin = (torch.randn(rows, positions, size, generator=made) for _ in range(2))
    try:
        expected = theirs(query, key, cos, sin)
    except (TypeError, RuntimeError):  # other arguments, or shapes
        return False
    found = (turned(heads, cos.unsqueeze(1), sin.unsqueeze(1)) for heads in (query, key))
    pairs = zip(expected, found, strict=True)
    return all(bool(((a - b).abs() <= TOLERANCE * b.abs().clamp(min=1.0)).all()) for a, b in pairs)
