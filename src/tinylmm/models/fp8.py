"""Frozen linear layers whose weights are held in eight-bit floats (float8_e4m3fn), as torch._scaled_mm multiplies them.

Each row of the weight and each position of the input has a scale of its own, so that what else is in a batch changes no
position's numbers. Where the device has no such product (a CPU, a GPU below compute capability 8.9), the same eight-bit
numbers are multiplied in fp32: slower, with the same result up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinylmm.sizing.memory import FP8_MULTIPLE

LARGEST = torch.finfo(torch.float8_e4m3fn).max
LEAST = 1e-12
"""Scale of rows that are all zero."""


class Float8Linear(nn.Module):
    """A linear layer that is not trained, in eight bits; takes (..., in) and gives (..., out) in bf16.

    Weights are buffers of bytes: no optimiser, no cast of the model and no exchange between ranks has to know float8.
    """

    weight8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of `linear`, which may be of any floating type."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rounded, scale = in_eight_bits(linear.weight.detach())
        self.register_buffer("weight8", rounded.view(torch.uint8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        y: Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight8, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight8: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight8, scale)
        ctx.narrowed = x.dtype
        weight = weight8.view(torch.float8_e4m3fn)
        with torch.autocast(x.device.type, enabled=False):
            rounded, own = in_eight_bits(x)
            if multiplies(x.device):
                return torch._scaled_mm(
                    rounded, weight.t(), scale_a=own, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=False
                )
            return ((rounded.float() @ weight.float().t()) * own * scale.t()).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight8, scale = ctx.saved_tensors
        weight = (weight8.view(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
        return (gradients[0].to(torch.bfloat16) @ weight).to(ctx.narrowed), None, None


def in_eight_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix (n, m) rounded to float8_e4m3fn, and the fp32 scale (n, 1) that each of its rows is multiplied by."""
    wide = matrix.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=LEAST)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def multiplies(device: torch.device) -> bool:
    """Whether a device multiplies eight-bit floats: GPUs of compute capability 8.9 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def hold_in_eight_bits(root: nn.Module, names: Iterable[str]) -> int:
    """Replace those linear layers of `root` whose sides allow it, a layer at a time, and return how many they are.

    torch._scaled_mm takes matrices whose sides are multiples of FP8_MULTIPLE.
    """
    count = 0
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = root.get_submodule(name)
        if type(linear) is nn.Linear and not (linear.in_features % FP8_MULTIPLE or linear.out_features % FP8_MULTIPLE):
            setattr(root.get_submodule(parent), leaf, Float8Linear(linear))
            count += 1
    return count
