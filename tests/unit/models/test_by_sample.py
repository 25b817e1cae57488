"""Attention of samples end to end on a CPU: in blocks or at once, it is softmax(q k^T) v within each sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinylmm.models import by_sample
from tinylmm.models.by_sample import BLOCK, LONGEST, attend_sample_by_sample

LENGTHS = (1, BLOCK, 3, 2 * BLOCK + 7, 0, BLOCK + 1)
HEADS, SIZE = 4, 8


@pytest.fixture(autouse=True)
def _however_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_sample, "NARROWEST", 0)


def drawn(
    lengths: tuple[int, ...], keys: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the bounds of samples."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, SIZE, generator=draw, dtype=dtype) for n in (HEADS, keys, keys))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.tensor([0, *lengths]).cumsum(0).int()


def by_definition(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None) -> Tensor:
    numbers = torch.arange(len(q))
    sample = torch.bucketize(numbers, bounds[1:], right=True)
    seen = (sample[:, None] == sample) & (numbers[:, None] >= numbers)
    if window is not None:
        seen &= numbers[:, None] - numbers < window
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def slopes(mixed: Tensor, of: tuple[Tensor, ...], read: Tensor | slice = slice(None)) -> list[Tensor]:
    weights = torch.arange(mixed.numel(), dtype=mixed.dtype).view_as(mixed).cos()
    return [mixed.detach()[read], *torch.autograd.grad((mixed * weights)[read].sum(), of)]


@pytest.mark.parametrize("longest", [LONGEST, BLOCK], ids=["in blocks", "at once"])
@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, BLOCK + 3, 10 * LONGEST])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_it_is_its_definition(
    longest: int, keys: int, window: int | None, some: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sample, "LONGEST", longest)
    by_sample._band.cache_clear()
    *of, bounds = drawn(LENGTHS, keys)
    q, k, v = of
    ends = bounds.tolist()
    needed = torch.tensor([ends[2] - 1, ends[3] + BLOCK, ends[4] - 1, ends[5]]) if some else None
    read: Tensor | slice = slice(None) if needed is None else needed
    found = slopes(attend_sample_by_sample(q, k, v, bounds, 0.3, window, needed), (q, k, v), read)
    expected = slopes(by_definition(q, k, v, bounds, 0.3, window), (q, k, v), read)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    by_sample._band.cache_clear()


def test_what_is_not_read_is_not_computed() -> None:
    q, k, v, bounds = drawn((BLOCK, BLOCK), 4)
    out = attend_sample_by_sample(q, k, v, bounds, None, None, torch.tensor([BLOCK - 1]))
    assert not out[: BLOCK - 1].any() and out[BLOCK - 1].any() and not out[BLOCK:].any()


def test_a_sample_does_not_change_with_its_neighbours() -> None:
    q, k, v, bounds = drawn((70, 100, 30), 2, torch.float32)
    row = attend_sample_by_sample(q, k, v, bounds, None, None)
    alone = attend_sample_by_sample(q[70:170], k[70:170], v[70:170], torch.tensor([0, 100]).int(), None, None)
    torch.testing.assert_close(row[70:170], alone, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        k[:70] += 100.0
        v[170:] += 100.0
    assert torch.equal(attend_sample_by_sample(q, k, v, bounds, None, None)[70:170], row[70:170])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_scores_in_fp32(dtype: torch.dtype) -> None:
    """PyTorch's kernel does; products of halves would round each score, and it shows."""
    q, k, v, bounds = drawn((40, 90), 4, torch.float32)
    low = [heads.detach().to(dtype) for heads in (2 * q, k, v)]
    expected = by_definition(*(heads.float() for heads in low), bounds, 1.0, None)
    found = attend_sample_by_sample(*low, bounds, 1.0, None).float()
    assert float((found - expected).norm()) < 0.5 * torch.finfo(dtype).eps * float(expected.norm())


def test_under_autocast_all_heads_are_cast_alike() -> None:
    """Queries and keys that were turned by their positions are in fp32 there, and values in a half type."""
    q, k, v, bounds = drawn((40, 90), 4, torch.float32)
    mixed = v.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_sample_by_sample(q, k, mixed, bounds, 1.0, None)
    assert out.dtype == torch.bfloat16
    slope = torch.autograd.grad(out.float().sum(), (q, k, mixed))
    assert [one.dtype for one in slope] == [torch.float32, torch.float32, torch.bfloat16]
