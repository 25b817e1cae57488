"""The summed loss does not depend on how many times the output head is run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.builders import tiny_lmm
from tests.unit.models.llms import NAMES, tiny_llm
from tinylmm.models import loss
from tinylmm.models.fused_loss import CHUNK_BYTES, Shaping, can_fuse, fused_cross_entropy
from tinylmm.models.llm import head_logits
from tinylmm.models.loss import num_chunks, supervised_cross_entropy


def loss_and_gradients(tokens: int, chunks: int | None) -> tuple[Tensor, list[Tensor]]:
    llm = tiny_lmm().llm.train()
    width = llm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    total = supervised_cross_entropy(llm, hidden, targets, chunks)
    total.backward()
    head = llm.get_output_embeddings().weight.grad  # type: ignore[operator]
    assert hidden.grad is not None and head is not None, "also without a position, the graph reaches head and hidden"
    return total.detach(), [hidden.grad, head]


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 11])
def test_chunks_that_other_ranks_need_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, gradients = loss_and_gradients(tokens, 1 if tokens <= 4096 else None)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 4)
    for chunks in (None, num_chunks(tokens), num_chunks(tokens) + 2):
        total, found = loss_and_gradients(tokens, chunks)
        torch.testing.assert_close(total, expected)
        for gradient, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, other)


def test_the_number_of_chunks_is_counted_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 4)
    assert [num_chunks(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


def slopes_of(total: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(3.0 * total, of)]


def drawn(positions: int, width: int, words: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, width, generator=generator).requires_grad_()
    return hidden, torch.randint(0, words, (positions,), generator=generator)


@pytest.mark.parametrize("name", [*NAMES])
def test_head_and_loss_in_one_are_the_plain_cross_entropy(name: str) -> None:
    """Every LLM's head, with its bias, factor and soft cap: loss and gradients are those of all logits at once."""
    llm = tiny_llm(name)
    head = llm.get_output_embeddings()
    assert can_fuse(head)
    hidden, targets = drawn(13, head.weight.shape[1], head.weight.shape[0])
    of = [hidden, *head.parameters()]
    plain = slopes_of(F.cross_entropy(head_logits(llm, hidden), targets, reduction="sum"), of)
    for rows in (1, 5, 13, 400):
        found = slopes_of(fused_cross_entropy(head, loss.shaping_of(llm), hidden, targets, rows), of)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("shaping", [Shaping(), Shaping(0.3), Shaping(cap=2.0), Shaping(1.7, 1.5)], ids=str)
def test_what_is_done_to_logits_is_done_to_their_gradients(shaping: Shaping) -> None:
    head = nn.Linear(6, 11).double()
    hidden, targets = drawn(7, 6, 11)
    doubles = hidden.detach().double().requires_grad_()

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(shaping(F.linear(hidden, weight, bias)), targets, reduction="sum")

    expected = slopes_of(plain(doubles, head.weight, head.bias), [doubles, *head.parameters()])
    single = head.float()
    found = slopes_of(fused_cross_entropy(single, shaping, hidden, targets, 3), [hidden, *single.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gives_the_hidden_states_their_gradient_alone() -> None:
    head = nn.Linear(6, 11).requires_grad_(False)
    hidden, targets = drawn(7, 6, 11)
    total = fused_cross_entropy(head, Shaping(), hidden, targets, 2)
    total.backward()
    assert hidden.grad is not None and head.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(fused_cross_entropy(head, Shaping(), hidden, targets), total.detach())


def test_in_bf16_gradients_are_as_near_as_those_of_plain_bf16() -> None:
    head, (hidden, targets) = nn.Linear(64, 300), drawn(50, 64, 300)
    of = [hidden, *head.parameters()]
    exact = slopes_of(F.cross_entropy(head(hidden), targets, reduction="sum"), of)
    with torch.autocast("cpu", torch.bfloat16):
        plain = slopes_of(F.cross_entropy(head(hidden).float(), targets, reduction="sum"), of)
        found = slopes_of(fused_cross_entropy(head, Shaping(), hidden, targets, 16), of)
    for one, other, true in zip(found, plain, exact, strict=True):
        assert one.dtype == torch.float32
        assert float((one - true).norm()) <= 1.1 * float((other - true).norm()) + 1e-6


def test_heads_that_are_more_than_a_product_are_not_fused() -> None:
    head = nn.Linear(4, 8)
    assert can_fuse(head) and not can_fuse(nn.Sequential(head))
    with torch.autocast("cpu", torch.float16):
        assert not can_fuse(head), "fp16 gradients need the scale of their loss"
    head.register_forward_hook(lambda *_: None)
    assert not can_fuse(head)


def test_no_logits_of_a_whole_batch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 positions and 4,000 words (48 MB), never more than a chunk's rows are seen by the softmax."""
    seen = []
    plain = F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda logits, dim: (seen.append(logits.shape), plain(logits, dim=dim))[1])
    monkeypatch.setattr("tinylmm.models.fused_loss.CHUNK_BYTES", CHUNK_BYTES // 32)
    hidden, targets = drawn(3000, 4, 4000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        fused_cross_entropy(nn.Linear(4, 4000), Shaping(), hidden, targets).backward()
    assert max(rows * words * 4 for rows, words in seen) <= CHUNK_BYTES // 32 and len(seen) == 12
    assert not kept
