"""The optimiser of a training: which parameters go together, at which rate, and in how many bits its state is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn


def parameter_groups(
    network: nn.Module, decayed: Collection[str], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Trained parameters by part, those with weight decay apart from those without.

    Args:
        network: the LMM; the first word of a parameter's name is its part.
        decayed: names of the parameters that decay.
        rates: part -> peak learning rate.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.split(".", 1)[0], name in decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decay else 0.0, "part": part}
        for (part, decay), parameters in groups.items()
    ]


def build_optimizer(
    network: nn.Module, made: type[torch.optim.Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Make an optimiser; of one with 8-bit state, embeddings keep theirs in 32 bits, as under transformers' Trainer.

    Rows of an embedding have gradients too uneven for 8 bits (T. Dettmers et al., arXiv 2110.02861).
    """
    optimizer = made(groups, **options)
    if options.get("optim_bits") == 8:
        from bitsandbytes.optim import GlobalOptimManager

        for module in network.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
