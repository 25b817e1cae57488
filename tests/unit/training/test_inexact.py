"""Optimisers that no recipe was published with: what each moves how, and what rounding at random keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.builders import NoFiles, tiny_lmm, tuning
from tinylmm.config.compose import compose_run
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import StageSettings, TrainStage
from tinylmm.training.arguments import training_arguments
from tinylmm.training.inexact import MuonWithAdamW, NarrowAdamW, hidden_matrices, rounded_at_random
from tinylmm.training.optimizer import make_optimizer, parameter_groups

RATES = {"llm": 1e-3, "connector": 1e-2, "vision_tower": 1e-4}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_numbers_are_rounded_up_as_often_as_they_are_near_the_one_above() -> None:
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.0, 0.1, 0.5, 0.9):
        for sign in (1, -1):
            numbers = torch.full((40_000,), sign * (low + share * (high - low)))
            found = rounded_at_random(numbers, draw()).float() * sign
            assert set(found.tolist()) <= {low, high}
            assert float((found == high).float().mean()) == pytest.approx(share, abs=0.01)


def test_what_is_no_number_stays_so_and_large_ones_stay_finite() -> None:
    numbers = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 3.38e38, -3.38e38])
    for seed in range(20):
        found = rounded_at_random(numbers, draw(seed)).float()
        assert found[0].isnan() and found[1:4].tolist() == [float("inf"), float("-inf"), 0.0]
        assert bool(found[4:].isfinite().all())


def test_a_second_moment_in_bf16_fades_as_in_fp32_where_rounding_to_the_nearest_holds_it() -> None:
    weight = nn.Parameter(torch.zeros(2_000))
    optimizer = NarrowAdamW([weight], lr=0.0)
    nearest = torch.tensor(0.001, dtype=torch.bfloat16)
    for step in range(400):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
        nearest = (nearest.float() * 0.999).to(torch.bfloat16)
    moment = optimizer.state[weight]["exp_avg_sq"]
    assert moment.dtype == optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16
    assert float(moment.float().mean()) == pytest.approx(0.001 * 0.999**399, rel=0.02)
    assert float(nearest) == pytest.approx(0.001, rel=0.01), "so it would be"


def test_adamw_in_bf16_goes_where_adamw_goes() -> None:
    ways = []
    for made in (torch.optim.AdamW, NarrowAdamW):
        weight = nn.Parameter(torch.linspace(-1, 1, 500))
        optimizer = made([weight], lr=0.01, weight_decay=0.1)
        for step in range(100):
            weight.grad = 2 * (weight.detach() - 0.3) + 0.1 * torch.randn(500, generator=draw(step))
            optimizer.step()
        ways.append(weight.detach().clone())
    moved = (ways[0] - torch.linspace(-1, 1, 500)).abs().mean()
    assert float((ways[1] - ways[0]).abs().mean()) < 0.02 * float(moved)


def test_ranks_round_alike_and_another_seed_otherwise() -> None:
    def after(seed: int) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(100))
        optimizer = NarrowAdamW([weight], lr=0.1, seed=seed)
        for step in range(3):
            weight.grad = torch.randn(100, generator=draw(step))
            optimizer.step()
        return weight.detach()

    assert torch.equal(after(1), after(1)) and not torch.equal(after(1), after(2))


def test_muon_moves_matrices_of_hidden_layers_and_adamw_the_rest() -> None:
    model = tiny_lmm()
    tuning(model, {"llm": "full", "vision_tower": "frozen", "connector": "full"}, seed=0)
    hidden = hidden_matrices(model)
    embedding = next(n for n, p in model.named_parameters() if p is model.llm.get_input_embeddings().weight)
    head = next(n for n, p in model.named_parameters() if p is model.llm.get_output_embeddings().weight)
    assert not {embedding, head} & hidden and any("connector" in name for name in hidden)
    groups = parameter_groups(model, hidden | {embedding}, RATES, 0.1, hidden)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients = {
        name: torch.randn(p.shape, generator=draw(1)) for name, p in model.named_parameters() if p.requires_grad
    }
    optimizer = MuonWithAdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        alone = nn.Parameter(before[name])
        decay, rate = (0.1 if name in hidden | {embedding} else 0.0), RATES[name.partition(".")[0]]
        plain: torch.optim.Optimizer = torch.optim.AdamW([alone], lr=rate, betas=(0.9, 0.95), weight_decay=decay)
        if name in hidden:
            plain = torch.optim.Muon([alone], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        for _ in range(2):
            alone.grad = gradients[name]
            plain.step()
        torch.testing.assert_close(parameter.detach(), alone.detach(), rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize(("optim", "made"), [("muon", MuonWithAdamW), ("adamw_bf16", NarrowAdamW)])
def test_a_training_has_the_optimiser_that_is_named(
    optim: str, made: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage = next(s for s in build_graph(compose_run([f"trainer.optim={optim}"]), NoFiles()) if s.kind == "train")
    settings, spec = StageSettings.model_validate(stage.settings), TrainStage.model_validate(stage.spec)
    assert stage.spec["trainer"] == {"optim": optim}
    folder = tmp_path_factory.mktemp("work")
    arguments = training_arguments(
        spec, settings.launch, settings.tracking, settings.trainer, folder, 4, 1, use_cpu=True, readers=0
    )
    model = tiny_lmm()
    tuning(model, {"llm": "frozen", "vision_tower": "frozen", "connector": "full"}, seed=0)
    assert type(make_optimizer(model, arguments, RATES)) is made
