"""Frozen linear layers of a training on a CPU, their weights laid out once for the whole stage as oneDNN's kernels read them.

A product with plain weights lays them out anew each time. Frozen weights never change, so this is done once, before the first
product of either pass: an eighth of a step's time where an LLM is frozen (measured on two cores with AVX-512, beside MKL).
Numbers differ by rounding alone. It costs a copy of the weights for the forward pass and, where gradients flow through a
layer, one for the backward pass; `sizing/memory.py` counts them.
"""

from __future__ import annotations

import logging
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylmm.sizing.memory import PREPACKED_AT_MOST, PREPACKED_FROM

log = logging.getLogger(__name__)

ROWS = 1024
"""Rows that the kernels are chosen for: positions of a row on a CPU. Others are multiplied as rightly."""
TRIED = 4
"""Rows that a product is tried on."""
TOLERANCE = 1e-4
"""Largest difference, relative to the largest number, that counts as rounding."""


def prepack(part: nn.Module) -> int:
    """Let frozen linear layers of a part multiply by weights that are laid out once; returns how many do.

    Layers are taken in their order while their copies take PREPACKED_AT_MOST at most. None is where PyTorch has no such
    kernels for this machine.
    """
    taken, room = 0, PREPACKED_AT_MOST
    for module in part.modules():
        if not _is_frozen(module):
            continue
        room -= 2 * module.weight.numel() * module.weight.element_size()
        if room < 0 or (not taken and not _multiplies(module)):
            break
        module.forward = Prepacked(module)  # type: ignore[method-assign, assignment]
        taken += 1
    log.debug("laid out for oneDNN: %d layers", taken)
    return taken


def _is_frozen(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain fp32 linear layer whose weights are whole, worth it, and not trained."""
    if type(module) is not nn.Linear or module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return False
    if hasattr(module.weight, "ds_id") or module.weight.numel() < PREPACKED_FROM:
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _multiplies(layer: nn.Linear) -> bool:
    """Whether this machine's kernels give what the layer gives, both ways, tried on a few rows."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    made, packed = torch.Generator().manual_seed(0), Prepacked(layer)
    outputs, inputs = layer.weight.shape
    seen, slope = torch.randn(TRIED, inputs, generator=made), torch.randn(TRIED, outputs, generator=made)
    with torch.no_grad():
        pairs = ((packed.ahead(seen), layer(seen)), (packed.back(slope), slope @ layer.weight))
    return all(float((found - plain).abs().max()) <= TOLERANCE * float(plain.abs().max()) for found, plain in pairs)


class Prepacked:
    """A frozen linear layer's `forward`, and its two products; an object of its own, so that it can be copied."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._copies: dict[str, Tensor] = {}
        self._of: tuple[int, int] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.layer.weight
        plain = hidden.dtype != torch.float32 or weight.requires_grad or torch.is_autocast_enabled("cpu")
        if plain or torch.compiler.is_compiling():
            return F.linear(hidden, weight, self.layer.bias)
        out: Tensor = _Product.apply(hidden, self)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_copies": {}, "_of": None}

    def ahead(self, hidden: Tensor) -> Tensor:
        """hidden (..., inputs) times the weights, with the bias: (..., outputs)."""
        return _multiplied(hidden, self._laid_out("ahead"), self.layer.bias)

    def back(self, slope: Tensor) -> Tensor:
        """Gradient (..., outputs) of what came out to that of what went in: (..., inputs)."""
        return _multiplied(slope, self._laid_out("back"), None)

    def _laid_out(self, which: str) -> Tensor:
        weight = self.layer.weight.detach()
        if self._of != (weight.data_ptr(), weight._version):  # loaded or moved since
            self._copies, self._of = {}, (weight.data_ptr(), weight._version)
        if which not in self._copies:
            read = weight if which == "ahead" else weight.t().contiguous()
            self._copies[which] = torch.ops.mkldnn._reorder_linear_weight(read, ROWS)
        return self._copies[which]


def prepacked(layer: nn.Module) -> Prepacked | None:
    """A layer's products with laid out weights, where it has them."""
    forward = vars(layer).get("forward")
    return forward if isinstance(forward, Prepacked) else None


def _multiplied(rows: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), laid_out, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """The layer is frozen: it has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: Prepacked) -> Tensor:
        """See `Prepacked.ahead`."""
        ctx.layer = layer
        return layer.ahead(hidden)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """See `Prepacked.back`."""
        return ctx.layer.back(outer), None
