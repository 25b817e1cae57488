"""What makes a model train faster and changes none of its numbers, but for rounding."""

from __future__ import annotations

import logging

import torch
from torch import nn

from tinylmm.models.attention import decode_rows
from tinylmm.models.fused import NeededOnly, fuse, position_wise
from tinylmm.models.llm import decoder_of
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import decoder_blocks

log = logging.getLogger(__name__)

TRIED = 12
"""Positions of the two samples that the last block is tried on."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest number, that counts as rounding (fp32)."""


def speed_up(model: LMM, device: torch.device) -> None:
    """Fuse a model's activations and norms; on a CPU, also let its last block compute what is learnt from alone.

    To be called once the model is on its device and its adapters are added. On a GPU the last block keeps its shapes, which
    are constant from step to step.
    """
    on_cpu = device.type == "cpu"
    for part in (model.llm, model.vision_tower):
        fuse(part, on_cpu)
    if on_cpu and (modules := _position_wise(model.llm)):
        model.needed.take(modules)


def _position_wise(llm: nn.Module) -> list[nn.Module]:
    """Modules behind the last attention, where they are found to be position-wise by trying them."""
    if not all(parameter.is_floating_point() for parameter in llm.parameters()):
        return []  # quantised layers pack their weights anew, for good, when they are tried outside training
    try:
        modules = position_wise(decoder_blocks(llm)[-1])
    except ValueError:  # blocks in no list
        return []
    forwards = [module.forward for module in modules]
    needed = NeededOnly()
    weight = next(llm.parameters())
    embeddings = torch.randn(1, TRIED, llm.get_input_embeddings().weight.shape[1], dtype=weight.dtype)  # type: ignore[operator]
    positions = torch.cat([torch.arange(TRIED // 2)] * 2).unsqueeze(0)
    wanted = torch.tensor([2, TRIED - 1])
    training = llm.training
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()
    try:
        with torch.no_grad():
            plain = decode_rows(decoder_of(llm), embeddings, positions)[0, wanted]
            needed.take(modules)
            needed.positions = wanted
            for module in modules:
                module.train()
            found = decode_rows(decoder_of(llm), embeddings, positions)[0, wanted]
        return modules if float((found - plain).abs().max()) <= TOLERANCE * float(plain.abs().max()) else []
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        for module, mode in modes:
            module.training = mode
        llm.training = training
