"""The summed loss does not depend on how many times the output head is run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.builders import tiny_lmm
from tinylmm.models import loss
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
