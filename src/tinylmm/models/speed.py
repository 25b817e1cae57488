"""What makes a model train faster and changes none of its numbers, but for rounding."""

from __future__ import annotations

import logging

import torch
from torch import nn

from tinylmm.models.attention import decode_rows
from tinylmm.models.fused import NEEDED, NeededOnly, attentions_of, fuse, position_wise
from tinylmm.models.llm import decoder_of
from tinylmm.models.lmm import LMM
from tinylmm.models.prepacked import prepack
from tinylmm.models.tuning import decoder_blocks

log = logging.getLogger(__name__)

TRIED = 12
"""Positions of the two samples that the last block is tried on."""
TOLERANCES = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.005}
"""Largest difference, relative to the largest number, that counts as rounding: four units of the half types' last place."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def speed_up(model: LMM, device: torch.device, precision: str = "fp32") -> None:
    """Fuse a model's activations and norms, and let its last block compute what is learnt from alone.

    On a CPU frozen weights are laid out for its kernels once.

    In bf16, what goes from block to block is held in bf16 too, as DeepSpeed's bf16 has it in the published recipes.

    To be called once the model is on its device and its adapters are added.

    Args:
        precision: that it is trained in: fp32, bf16 or fp16.
    """
    on_cpu = device.type == "cpu"
    for part in (model.llm, model.vision_tower):
        fuse(part, on_cpu)
        if on_cpu and precision == "fp32":
            prepack(part)
    if precision == "bf16":
        model.residual_type = torch.bfloat16
    if (block := _last_block(model.llm)) is not None:
        modules, attentions = position_wise(block), attentions_of(block) if model.by_samples else []
        if _changes_nothing(model.llm, modules, attentions, device, precision):
            model.needed.take(modules, attentions)


def _last_block(llm: nn.Module) -> nn.Module | None:
    if not all(parameter.is_floating_point() for parameter in llm.parameters()):
        return None  # quantised layers pack their weights anew, for good, when they are tried outside training
    try:
        return decoder_blocks(llm)[-1]
    except ValueError:  # blocks in no list
        return None


def _changes_nothing(
    llm: nn.Module, modules: list[nn.Module], attentions: list[nn.Module], device: torch.device, precision: str
) -> bool:
    """Whether what is read stays the same if the last block computes that alone, found by trying it on two samples."""
    forwards = [module.forward for module in modules]
    needed = NeededOnly()
    weight = next(llm.parameters())
    width = llm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    embeddings = torch.randn(1, TRIED, width, generator=torch.Generator().manual_seed(0)).to(device, weight.dtype)
    positions = torch.cat([torch.arange(TRIED // 2)] * 2).unsqueeze(0).to(device)
    wanted = torch.tensor([2, TRIED - 1], device=device)
    low = HALF.get(precision)
    training = llm.training
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=low or torch.bfloat16, enabled=low is not None):
            plain = decode_rows(decoder_of(llm), embeddings, positions)[0, wanted]
            needed.take(modules, attentions)
            needed.positions = wanted
            for module in modules:
                module.train()
            for attention in attentions:
                attention.training = True
            found = decode_rows(decoder_of(llm), embeddings, positions)[0, wanted]
        furthest, largest = float((found - plain).abs().max()), float(plain.abs().max())
        return furthest <= TOLERANCES[precision] * largest
    finally:
        for attention in attentions:
            if hasattr(attention, NEEDED):
                delattr(attention, NEEDED)
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        for module, mode in modes:
            module.training = mode
        llm.training = training
