"""Attention over samples end to end: each by itself, whatever the kernel and however its arguments are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tests.flash import attend
from tinylmm.models import varlen
from tinylmm.models.varlen import adapted, attend_samples

LENGTHS = (5, 1, 9, 4)


def heads(keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), n, 8, generator=draw).to(dtype) for n in (4, keys, keys))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def bounds(padded: int = 0) -> Tensor:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(padded)]).to(torch.int32)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    parts = zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True)
    side = -1 if window is None else window - 1
    return torch.cat([attend(*part, scale, True, (side, 0), 0.0) for part in parts])


def slopes(mixed: Tensor, of: tuple[Tensor, ...]) -> list[Tensor]:
    weights = torch.arange(mixed.numel(), dtype=mixed.dtype).view_as(mixed).cos()
    return [mixed.detach(), *torch.autograd.grad((mixed * weights).sum(), of)]


def _with(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """What `varlen_attn` computes, exactly: sequences between bounds, aligned at the bottom right."""
    assert cu.dtype == torch.int32
    ends = cu[1:-1].tolist()
    parts = zip(q.tensor_split(ends), k.tensor_split(ends), v.tensor_split(ends), strict=True)
    return torch.cat([attend(*part, scale, window[1] == 0, window, 0.0) for part in parts])


def of_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    assert query.shape[1] == key.shape[1], "it was never tried with fewer key heads"
    return _with(query, key, value, cu_seq_q, None, (-1, 0) if is_causal else (-1, -1))


def of_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return _with(query, key, value, cu_seq_q, scale, window_size)


def of_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1), "it refuses fewer key heads without the word"
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _with(query, key, value, cu_seq_q, scale, window_size)


RELEASES = [of_2_10, of_2_11, of_2_13]
CASES = [(None, None), (0.7, None), (None, 3), (0.2, 4), (None, 99)]


@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize(("scale", "window"), CASES)
def test_sample_by_sample_is_attention_by_definition(keys: int, scale: float | None, window: int | None) -> None:
    of = heads(keys)
    expected = slopes(plain(*of, scale, window), of)
    for ends in (bounds(), bounds(padded=3)):
        found = slopes(attend_samples(*of, ends, max(LENGTHS), scale, window), of)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", RELEASES)
@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize(("scale", "window"), CASES)
def test_every_release_of_pytorch_is_told_the_same_thing(
    kernel: Callable[..., Tensor], keys: int, scale: float | None, window: int | None
) -> None:
    of = heads(keys)
    if kernel is of_2_10 and window is not None and window < max(LENGTHS):
        with pytest.raises(NotImplementedError, match=r"no window; use PyTorch 2\.11"):
            adapted(kernel)(of, bounds(), max(LENGTHS), scale, window)
        return
    expected = slopes(plain(*of, scale, window), of)
    for ends in (bounds(), bounds(padded=3)):
        found = slopes(adapted(kernel)(of, ends, max(LENGTHS), scale, window), of)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_installed_kernel_takes_the_arguments_that_it_is_given() -> None:
    """Its signature is one of those that the stand-ins have: all it is told, it knows."""
    assert varlen.KERNEL is not None, "PyTorch 2.10 and later have it"
    known = inspect.signature(varlen_attn).parameters
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"is_causal", "window_size"} & set(known)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize(("scale", "window"), CASES)
def test_the_real_kernel_is_as_near_as_its_precision(keys: int, scale: float | None, window: int | None) -> None:
    exact = heads(keys)
    expected = slopes(plain(*exact, scale, window), exact)
    low = tuple(t.detach().cuda().bfloat16().requires_grad_() for t in exact)
    mixed = attend_samples(*low, bounds(padded=3).cuda(), max(LENGTHS), scale, window)  # type: ignore[misc]
    weights = torch.arange(mixed.numel()).view(mixed.shape).cos().cuda()
    found = [mixed.detach(), *torch.autograd.grad((mixed.float() * weights).sum(), low)]
    for one, other in zip(found, expected, strict=True):
        assert float((one.cpu().float() - other).norm() / other.norm()) < 0.02
