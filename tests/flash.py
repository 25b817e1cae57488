"""What stands in for flash-attn's two functions on a CPU: exact attention, in any precision, under transformers' own code.

Everything above them is the real thing: how transformers unpads, cuts rows at bounds, sets windows and soft caps.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers.modeling_flash_attention_utils as real
from torch import Tensor, nn
from transformers import PreTrainedModel

FLASH = "flash_attention_2"

CALLS: Counter[str] = Counter()
"""How often either function was called since `install`."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """One sequence, (Lq, H, E) and (Lk, K, E): flash-attn's definition, aligned at the bottom right."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k))[None] - (torch.arange(len(q)) + len(k) - len(q))[:, None]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen if left < 0 else seen & (distance >= -left)
    seen = seen if right < 0 else seen & (distance <= right)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Rows of equal length, (B, L, H, E)."""
    assert not dropout_p, "the stand-in drops nothing"
    CALLS["dense"] += 1
    rows = zip(q, k, v, strict=True)
    return torch.stack([attend(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Sequences end to end, (N, H, E), between their bounds, which the kernels want as int32."""
    assert not dropout_p, "the stand-in drops nothing"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])) == (0, len(q)), "every token lies in a sequence"
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
    CALLS["varlen"] += 1
    ends = (cu_seqlens_q[1:-1].tolist(), cu_seqlens_k[1:-1].tolist())
    parts = zip(q.tensor_split(ends[0]), k.tensor_split(ends[1]), v.tensor_split(ends[1]), strict=True)
    return torch.cat([attend(*part, softmax_scale, causal, window_size, softcap) for part in parts])


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Put both in place of flash-attn's and return the count of their calls."""
    functions = {
        "_loaded_implementation": FLASH,
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": real._pad_input,
        "_unpad_fn": real._unpad_input,
        "_process_flash_kwargs_fn": real._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, function in functions.items():
        monkeypatch.setattr(real, name, function)
    CALLS.clear()
    return CALLS


def use(model: nn.Module, attention: str) -> None:
    """Set the attention of every part of a model, without transformers' question for the real flash-attn."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = attention
