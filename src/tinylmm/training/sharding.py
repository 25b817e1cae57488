"""ZeRO-3: weights that are spread over the ranks one parameter at a time, so that no rank ever has the whole model.

DeepSpeed spreads a model when its engine is made, after it was moved to the device whole. Here the LLM waits on the CPU,
memory-mapped, and on the first rank alone: the others have its shapes (the meta device).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from tinylmm.training.ranks import rank
from tinylmm.training.state import own_shares, owner_ranks, trained


def exact_shares(model: nn.Module, arguments: TrainingArguments, spreads: bool) -> dict[str, Tensor]:
    """What `state.Partitioned.put_weights` takes, before DeepSpeed has the model; every rank must call it.

    Args:
        spreads: spread the model, too (see `spread`).
    """
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if spreads:
        return spread(model, arguments.deepspeed, dtype, arguments.device)
    return {} if dtype is None else own_shares(trained(model))


def spread(
    model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """Give every rank its share of each parameter, as the first rank has it; every rank must call it.

    Args:
        model: its parameters real on the first rank, wherever they lie; real or on the meta device on the others.
        config: DeepSpeed's, with ZeRO-3.
        dtype: what the engine computes in; None leaves each parameter its own.
        device: where shares lie; buffers are moved there too.

    Returns:
        in fp32 on the CPU, the whole trained parameters that this rank answers for (`state.own_shares`), as they were before
        they were rounded to `dtype`; none without one.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    names = trained(model)
    owner_of = dict(zip(names, owner_ranks(names), strict=True))
    shares: dict[str, Tensor] = {}
    first: Any = None
    for name, parameter in model.named_parameters():
        floating = parameter.is_floating_point()
        whole = torch.empty_like(parameter, device=device) if rank() else parameter.detach().to(device)
        torch.distributed.broadcast(whole, 0)
        if dtype is not None and owner_of.get(name) == rank():
            shares[name] = whole.to("cpu", torch.float32, copy=True)
        value = whole.to(dtype) if dtype is not None and floating else whole
        # in place, as modules, hooks and tied layers refer to the parameter; `.data` cannot leave the meta device
        torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
        if first is None:
            first = parameter
            Init(module=nn.ParameterList([parameter]), config_dict_or_path=dict(config))
        else:
            first.convert_to_zero_parameters([parameter])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return shares
