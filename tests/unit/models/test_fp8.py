"""Frozen linear layers in eight-bit floats: how far they are from bf16, and what does not depend on what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinylmm.models.fp8 import Float8Linear, hold_in_eight_bits, multiplies

WORST = 2.0**-3
"""Relative error of a product of two numbers that are each rounded to three bits behind the leading one, and some more."""


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48, bias=bias).requires_grad_(False)


def check(device: str) -> None:
    linear = layer().to(device)
    x = torch.randn(2, 7, 64, device=device, requires_grad=True)
    held = Float8Linear(linear)
    with torch.autocast(device, torch.bfloat16):
        y = held(x)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 7, 48)
    assert gradient.dtype == x.dtype
    bound = WORST * (x.abs() @ linear.weight.abs().t()) + 0.01
    off, exactly = (y.float() - linear(x)).detach().abs(), linear(x).detach()
    assert bool((off <= bound).all())
    assert 0.001 < float(off.mean() / exactly.abs().mean()) < 0.05, "rounded, and no more than that"
    exact = 2 * y.detach().float() @ linear.weight
    assert float((gradient - exact).norm() / exact.norm()) < 0.05


def test_outputs_and_gradients_are_within_rounding_of_the_layer() -> None:
    check("cpu")


@pytest.mark.gpu
def test_a_gpu_multiplies_the_same_numbers() -> None:
    check("cuda")
    x, held = torch.randn(33, 64), Float8Linear(layer())
    on_cpu = held(x)
    assert multiplies(torch.device("cuda")), "needs compute capability 8.9"
    torch.testing.assert_close(held.cuda()(x.cuda()).cpu(), on_cpu, rtol=0.01, atol=0.01)


def test_no_position_depends_on_another() -> None:
    held, x = Float8Linear(layer()), torch.randn(5, 64)
    beside = torch.cat([x, 1000 * torch.randn(3, 64)])
    torch.testing.assert_close(held(beside)[:5], held(x))


def test_numbers_of_any_size_keep_their_precision_and_zeros_stay_zeros() -> None:
    held = Float8Linear(layer(bias=False))
    x = torch.randn(1, 64)
    for size in (1e-4, 1e4):
        torch.testing.assert_close(held(size * x).float() / size, held(x).float(), rtol=0.02, atol=0.02)
    assert not held(torch.zeros(1, 64)).any()


def test_weights_take_a_byte_and_are_in_no_state() -> None:
    held = Float8Linear(layer())
    assert held.weight8.element_size() == 1
    assert not held.state_dict()
    assert not list(held.parameters())
    assert held.to(torch.bfloat16).weight8.dtype == torch.uint8


def test_layers_that_a_gpu_could_not_multiply_stay() -> None:
    root = nn.ModuleDict({"fits": nn.Linear(32, 16), "odd": nn.Linear(32, 17)})
    assert hold_in_eight_bits(root, ["fits", "odd"]) == 1
    assert isinstance(root["fits"], Float8Linear)
    assert type(root["odd"]) is nn.Linear
