"""Attention over samples laid end to end, each by itself: no mask, whatever the kernel.

On a GPU in bf16 or fp16 that is PyTorch's `torch.nn.attention.varlen`, whose arguments have moved from release to release;
everywhere else it is one causal attention a sample (`models/by_sample.py`), which costs the sum of the samples' squares where
a mask over the whole row costs the square of their sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinylmm.models.by_sample import attend_sample_by_sample

HALF = (torch.bfloat16, torch.float16)
"""What the varlen kernels compute in."""


Heads = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Heads, Tensor, int, float | None, int | None], Tensor]
"""Heads (query, key, value), bounds, longest, scale, window -> (N, H, E), as `attend_samples` has them."""


def attend_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
    needed: Tensor | None = None,
) -> Tensor:
    """Causal attention within each sample.

    Args:
        query: (N, H, E), N positions of all samples.
        key, value: (N, K, E), where K divides H.
        bounds: (samples + 1,) int32, where samples begin, and N.
        longest: positions of the longest sample, or more.
        scale: of the scores; None is 1 / sqrt(E).
        window: how many positions, its own counted in, a position sees at most; None is all before it.
        needed: (S,) int64, ascending, the positions whose results are read; None is all.

    Returns:
        (N, H, E), zeros perhaps where they are not needed.
    """
    if KERNEL is None or not query.is_cuda or query.dtype not in HALF:
        return attend_sample_by_sample(query, key, value, bounds, scale, window, needed)
    return KERNEL((query, key, value), bounds, longest, scale, window)


def adapted(kernel: Callable[..., Any]) -> Attention:
    """`varlen_attn` of whatever release of PyTorch as one function, which asks what it knows once and is compiled as it is.

    Up to 2.10 it knows `is_causal` and no window; from 2.11 causal is the window (-1, 0), and there is `scale`; from 2.13 it
    takes fewer key heads only where it is told (`enable_gqa`); 2.11 and 2.12 take them unasked, and for 2.10 they are repeated.

    Raises (the function):
        NotImplementedError: a window is asked of a release that has none.
    """
    known = inspect.signature(kernel).parameters
    takes_groups, takes_window, takes_scale = (name in known for name in ("enable_gqa", "window_size", "scale"))

    def attend(heads: Heads, bounds: Tensor, longest: int, scale: float | None, window: int | None) -> Tensor:
        query, key, value = heads
        options: dict[str, Any] = {}
        if key.shape[1] != query.shape[1]:
            if takes_groups:
                options["enable_gqa"] = True
            elif not takes_window:
                groups = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if takes_window:
            options["window_size"] = (-1, 0) if window is None or window >= longest else (window - 1, 0)
        elif window is None or window >= longest:
            options["is_causal"] = True
        else:
            raise NotImplementedError("varlen_attn of this PyTorch has no window; use PyTorch 2.11 or later")
        own = query.shape[-1] ** -0.5
        if scale is not None and abs(scale - own) > 1e-6 * own:
            if takes_scale:
                options["scale"] = scale
            else:
                query = query * (scale / own)
        mixed: Tensor = kernel(query, key, value, bounds, bounds, longest, longest, **options)
        return mixed

    return attend


def _installed() -> Attention | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        return None
    return adapted(varlen_attn)


KERNEL = _installed()
"""Of the installed PyTorch; None where it has none."""
