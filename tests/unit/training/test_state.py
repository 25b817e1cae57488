"""A training's state is written whole and read back exactly, for every kind of optimiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.optimization import Adafactor

from tinylmm.errors import IntegrityError
from tinylmm.training.inexact import MuonWithAdamW, NarrowAdamW
from tinylmm.training.state import Replicated, load_state, load_weights, save_state


def muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices by Muon, the rest by AdamW."""
    groups = [
        {"params": [p for p in parameters if (p.dim() == 2) == hidden], "hidden": hidden} for hidden in (True, False)
    ]
    return MuonWithAdamW([group | {"weight_decay": 0.1} for group in groups], lr=0.1, betas=(0.9, 0.999), eps=1e-8)


OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], str]] = {
    "adamw": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1), "by name"),
    "fused adamw": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True), "by name"),
    "sgd": (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "by name"),
    "sgd with momentum": (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "by name"),
    "rmsprop": (lambda parameters: torch.optim.RMSprop(parameters, lr=0.1), "by name"),
    "adagrad": (lambda parameters: torch.optim.Adagrad(parameters, lr=0.1), "by name"),
    "adamw in bf16": (lambda parameters: NarrowAdamW(parameters, lr=0.1), "by name"),
    "muon": (lambda parameters: muon(parameters), "by name"),
    "adafactor": (
        lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False),
        "replicated",
    ),
}
INPUT = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    """A layer that is trained behind one that is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> Tensor:
    for _ in range(count):
        loss = model(INPUT).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_exactly_where_it_was(kind: str, tmp_path: Path) -> None:
    make, form = OPTIMIZERS[kind]
    whole = network()
    expected = steps(whole, make(list(whole[1].parameters())), 5)  # type: ignore[index]

    first = network()
    optimizer = make(list(first[1].parameters()))  # type: ignore[index]
    steps(first, optimizer, 3)
    assert save_state(tmp_path, first, Replicated(optimizer)) == form
    second = network()
    optimizer = make(list(second[1].parameters()))  # type: ignore[index]
    load_weights(tmp_path, second)
    load_state(tmp_path, second, Replicated(optimizer))
    assert torch.equal(steps(second, optimizer, 2), expected)


def test_frozen_weights_are_not_written_and_tensors_stand_under_their_parameters(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)  # type: ignore[index]
    steps(model, optimizer, 2)
    save_state(tmp_path, model, Replicated(optimizer))
    written = load_file(tmp_path / "state-00001-of-00001.safetensors")
    assert sorted(written) == [f"1.{n}/{k}" for n in ("bias", "weight") for k in ("exp_avg", "exp_avg_sq", "weight")]
    record = json.loads((tmp_path / "optimizer.json").read_text())
    assert record == {"form": "by name", "numbers": {"1.weight": {"step": 2.0}, "1.bias": {"step": 2.0}}}


def test_another_set_of_trained_tensors_is_refused(tmp_path: Path) -> None:
    model = network()
    save_state(tmp_path, model, Replicated(torch.optim.AdamW(model[1].parameters())))  # type: ignore[index]
    model[1].bias.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(IntegrityError, match=r"other tensors than this stage trains: \['1.bias'\]"):
        load_weights(tmp_path, model)
