"""What is fused computes what transformers' own modules do, with the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.unit.models.llms import NAMES, tiny_llm
from tinylmm.models.fused import fuse, rms_norm

UNITY = ("gemma", "gemma2_2b", "gemma3_270m", "gemma3_1b")
"""Their norms have a weight of 1 + w, and another name for epsilon: they stay as they are."""


def learn(llm: nn.Module) -> list[Tensor]:
    """Logits and every parameter's gradient of a small batch."""
    ids = torch.arange(22).view(2, 11) % 100 + 5
    logits = llm(input_ids=ids, use_cache=False).logits
    weights = torch.arange(logits.numel(), dtype=torch.float32).view(logits.shape).cos()
    (logits * weights).sum().backward()
    return [logits.detach(), *(p.grad for p in llm.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_llm_learns_what_the_plain_one_learns(name: str) -> None:
    plain = tiny_llm(name).eval()
    fused = copy.deepcopy(plain)
    counts = fuse(fused, on_cpu=True)
    blocks = plain.config.get_text_config().to_dict().get("num_hidden_layers", 3)
    assert counts["gelu"] == (blocks if name == "phi2" else 0)
    if name not in UNITY and name not in ("phi2", "stablelm2") and "openelm" not in name:
        assert counts["rms_norm"] >= 2 * blocks + 1
    assert list(fused.state_dict()) == list(plain.state_dict())
    for one, other in zip(learn(fused), learn(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_a_norm_is_its_definition_and_so_are_its_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 12, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(12, generator=draw, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-3), (hidden, weight))
    plain = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-3), plain)


def test_a_norm_that_only_looks_like_one_is_left_alone() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    assert fuse(nn.Sequential(Shifted()), on_cpu=True)["rms_norm"] == 0
