"""Groups of parameters, and optimisers with 8-bit state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.builders import tiny_lmm, tuning
from tinylmm.training.optimizer import build_optimizer, parameter_groups


def test_each_part_has_its_rate_and_only_what_decays_decays() -> None:
    model = tiny_lmm()
    tuning(model, {"llm": "full", "vision_tower": "frozen", "connector": "full"}, seed=0)
    decayed = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    groups = parameter_groups(model, decayed, {"llm": 1e-5, "connector": 1e-3}, 0.1)
    assert [(group["part"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("llm", 1e-5, 0.1),
        ("llm", 1e-5, 0.0),
        ("connector", 1e-3, 0.1),
        ("connector", 1e-3, 0.0),
    ]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(trained) and set(listed) == trained


@pytest.mark.parametrize(("bits", "linear"), [(8, torch.uint8), (32, torch.float32)])
def test_embeddings_keep_32_bits_of_state_where_other_weights_have_8(bits: int, linear: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"llm": nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 64))})
    groups = parameter_groups(model, [], {"llm": 1e-3}, 0.0)
    optimizer = build_optimizer(model, bitsandbytes.optim.AdamW, groups, {"lr": 1e-3, "optim_bits": bits})
    model["llm"](torch.arange(64)).sum().backward()
    optimizer.step()
    states = {name: optimizer.state[parameter]["state1"].dtype for name, parameter in model.named_parameters()}
    assert states["llm.0.weight"] == torch.float32 and states["llm.1.weight"] == linear
