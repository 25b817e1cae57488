"""Rotary embeddings in fewer passes turn as transformers' do, in models that were asked for it alone."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from tests.unit.models.llms import NAMES, tiny_llm
from tinylmm.models.fused import fuse
from tinylmm.models.rotary import NAME, turn_faster, turned

ROTATE_OTHERWISE = [name for name in NAMES if name.startswith("openelm")]
"""Their own class turns queries and keys inside a module."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ROTATE_OTHERWISE])
def test_every_attention_of_a_family_turns_faster_and_no_other_model_does(name: str) -> None:
    llm, other = tiny_llm(name).eval(), tiny_llm(name).eval()
    attentions = [module for module in llm.modules() if hasattr(module, "q_proj")]
    theirs = vars(sys.modules[type(attentions[0]).__module__])[NAME]
    assert fuse(llm, on_cpu=True)["rotary"] == len(attentions) >= 2
    assert vars(sys.modules[type(attentions[0]).__module__])[NAME] is theirs
    assert all("forward" not in vars(module) for module in other.modules() if hasattr(module, "q_proj"))


def test_a_copy_turns_its_own_heads() -> None:
    llm = tiny_llm("nano").eval()
    assert fuse(llm, on_cpu=True)["rotary"]
    copied = copy.deepcopy(llm)
    ids = torch.arange(10).view(2, 5) + 5
    before = copied(input_ids=ids).logits
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.zero_()
    assert torch.equal(copied(input_ids=ids).logits, before)


def test_turning_is_its_definition_and_so_is_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 3, 5, 8, generator=draw, dtype=torch.float64).requires_grad_()
    cos, sin = (torch.randn(2, 1, 5, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: turned(x, cos, sin), (heads,))
    low, high = heads.chunk(2, -1)
    torch.testing.assert_close(turned(heads, cos, sin), heads * cos + torch.cat([-high, low], -1) * sin)


def test_heads_come_out_one_after_the_other_and_gradients_position_by_position() -> None:
    heads = torch.randn(1, 5, 3, 8).transpose(1, 2).requires_grad_()  # as a projection's view has them
    angles = torch.randn(1, 1, 5, 8)
    out = turned(heads, angles.cos(), angles.sin())
    (slope,) = torch.autograd.grad(out.sum(), heads)
    assert out.is_contiguous() and slope.transpose(1, 2).is_contiguous()


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs lie side by side, as in GPT-J: another turn than ours."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    both = [x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k)]
    return both[0], both[1]


def test_a_function_that_turns_otherwise_is_left_alone() -> None:
    class Interleaved(nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return apply_rotary_pos_emb(q, k, cos, sin)

    module = Interleaved()
    assert not turn_faster(module) and "forward" not in vars(module)
    assert not turn_faster(nn.Linear(2, 2))
