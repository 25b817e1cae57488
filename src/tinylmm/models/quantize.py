"""Weights held in 4 or 8 bits through bitsandbytes (extra `qlora`), on a GPU or on the CPU (arXiv 2305.14314, 2208.07339)."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tinylmm.config.description import QuantizationEntry
from tinylmm.errors import UserError

OUTLIER_THRESHOLD = 6.0
"""Columns of 8-bit layers' inputs with a value above it are multiplied in 16 bits (LLM.int8, section 3.2)."""


def quantize_linears(
    root: nn.Module, names: Iterable[str], held_as: QuantizationEntry, compute: torch.dtype, device: torch.device
) -> None:
    """Replace linear layers of `root` by quantised ones, a layer at a time, so that no second whole copy exists.

    Args:
        root: the module that `names` are relative to; changed in place.
        held_as: in how many bits, and how.
        compute: dtype of the 4-bit layers' matrix products.
        device: where each layer is quantised, and stays.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(parent)
        setattr(module, leaf, _quantized(module.get_submodule(leaf), held_as, compute, device))


def round_trip(root: nn.Module, names: Iterable[str], held_as: QuantizationEntry) -> None:
    """Give linear layers the values that their quantised forms stand for: what a quantised model computes with, in fp32.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    require_bitsandbytes()
    from peft.utils.integrations import dequantize_bnb_weight

    for name in names:
        linear = root.get_submodule(name)
        held = _quantized(linear, held_as, torch.float32, linear.weight.device)  # type: ignore[arg-type]
        values = dequantize_bnb_weight(held.weight, state=getattr(held, "state", None))
        linear.weight.data.copy_(values.reshape(linear.weight.shape))  # type: ignore[operator]


def import_bitsandbytes() -> Any:
    """Return bitsandbytes, or None where it is not installed.

    On some CPUs it fetches a kernel from the Hugging Face hub and runs it, if the package `kernels` is there. Nothing here
    runs code from a hub, and training does not use that kernel, so `kernels` is hidden while it is imported. (That is done
    at once where `kernels` is installed: transformers' Trainer would import bitsandbytes next, in its own way.)
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, hidden = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes
    except ImportError:
        return None
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return bitsandbytes


def require_bitsandbytes() -> Any:
    """Return bitsandbytes.

    Raises:
        UserError: it is not installed.
    """
    found = import_bitsandbytes()
    if found is None:
        raise UserError(
            "qlora holds weights in 4 or 8 bits, which needs the package bitsandbytes, and it cannot be imported. "
            "Install it with `pip install 'tinylmm[qlora]'`, or tune with lora instead."
        )
    return found


def _quantized(linear: nn.Module, held_as: QuantizationEntry, compute: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen quantised copy of a linear layer, on `device`."""
    bnb = require_bitsandbytes()
    assert isinstance(linear, nn.Linear)
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach().to(torch.float32)
    if held_as.bits == 4:
        held = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=compute, device="meta")
        held.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=held_as.quant_type,
            compress_statistics=held_as.double_quant,
            module=held,
        )
    else:
        held = bnb.nn.Linear8bitLt(
            *sizes, bias=bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
        held.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    held.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False) if bias else None
    quantized: nn.Module = held.to(device)
    return quantized


if importlib.util.find_spec("kernels") is not None:
    import_bitsandbytes()
