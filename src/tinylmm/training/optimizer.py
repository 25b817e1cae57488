"""The optimiser of a training: which parameters go together, at which rate, and in how many bits its state is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from tinylmm.training.arguments import Arguments
from tinylmm.training.inexact import MuonWithAdamW, NarrowAdamW, hidden_matrices


def make_optimizer(network: nn.Module, arguments: Arguments, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """The optimiser of a training: a learning rate a part; no weight decay on biases and norms, as Trainer has it."""
    decayed = set(Trainer.get_decay_parameter_names(None, network))
    muon = arguments.own_optim == "muon"
    groups = parameter_groups(
        network, decayed, rates, arguments.weight_decay, hidden_matrices(network) if muon else None
    )
    adam = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    if muon:
        return MuonWithAdamW(groups, **adam)
    if arguments.own_optim == "adamw_bf16":
        return NarrowAdamW(groups, **adam, seed=arguments.seed)
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, network)
    return build_optimizer(network, made, groups, options)


def parameter_groups(
    network: nn.Module,
    decayed: Collection[str],
    rates: Mapping[str, float],
    weight_decay: float,
    hidden: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Trained parameters by part, those with weight decay apart from those without.

    Args:
        network: the LMM; the first word of a parameter's name is its part.
        decayed: names of the parameters that decay.
        rates: part -> peak learning rate.
        hidden: names of those that go into groups of their own, which say so; None leaves `hidden` out.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = name.split(".", 1)[0], name in decayed, name in (hidden or ())
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decay else 0.0, "part": part}
        | ({} if hidden is None else {"hidden": within})
        for (part, decay, within), parameters in groups.items()
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
