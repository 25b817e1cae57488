"""Frozen layers with weights that are laid out once compute what they compute without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.builders import build, tuning
from tests.unit.models import test_product as product
from tests.unit.models.llms import NAMES, tiny
from tests.unit.models.test_attention import CPU, step, without_dropout
from tests.unit.models.test_speed import learnt_in_part
from tests.unit.sizing.test_flops import TUNES, spec_of
from tests.unit.sizing.test_parameters import parts_of, written_out
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.models.fused_loss import Shaping, fused_cross_entropy
from tinylmm.models.prepacked import Prepacked, prepack, prepacked
from tinylmm.models.speed import speed_up
from tinylmm.sizing.memory import MicroBatch, Placement, step_memory


def layer(inputs: int = 1100, outputs: int = 256, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias).requires_grad_(False)


def packed(module: nn.Module) -> list[Prepacked]:
    return [found for one in module.modules() if (found := prepacked(one)) is not None]


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("tinylmm.models.prepacked", "tinylmm.sizing.memory"):
        monkeypatch.setattr(f"{module}.PREPACKED_FROM", 1)
    yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 500), (1, 1300)], ids=str)
def test_both_passes_of_a_frozen_layer_are_the_plain_ones(shape: tuple[int, ...], bias: bool) -> None:
    plain = layer(bias=bias)
    fast = copy.deepcopy(plain)
    assert prepack(nn.Sequential(fast)) == 1 and list(fast.state_dict()) == list(plain.state_dict())
    seen = torch.randn(*shape, 1100)
    slope = torch.randn(*shape, 256)
    ours, theirs = (seen.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(fast(ours), plain(theirs), rtol=1e-5, atol=1e-5)
    fast(ours).backward(slope)
    plain(theirs).backward(slope)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    turned = torch.randn(1100, 9).t()
    torch.testing.assert_close(fast(turned), plain(turned), rtol=1e-5, atol=1e-5)


def test_weights_that_are_loaded_later_are_laid_out_anew_and_a_copy_has_its_own() -> None:
    fast, seen = layer(), torch.randn(5, 1100)
    prepack(nn.Sequential(fast))
    before = fast(seen)
    other = copy.deepcopy(fast)
    other.load_state_dict({name: tensor * 2 for name, tensor in fast.state_dict().items()})
    torch.testing.assert_close(other(seen), before * 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(seen), before)


def test_what_is_trained_small_or_no_plain_layer_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    own = Own(1100, 256).requires_grad_(False)
    adapted = layer()
    adapted.bias.requires_grad_()
    stay = [layer().requires_grad_(), layer(16, 16), own, layer().bfloat16(), nn.Conv1d(1100, 1100, 1), adapted]
    assert prepack(nn.Sequential(*stay)) == 0
    later = layer()
    assert prepack(nn.Sequential(later)) == 1
    later.requires_grad_()
    later(torch.randn(3, 1100)).sum().backward()
    assert later.weight.grad is not None, "a layer that is trained after all is"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prepack(nn.Sequential(layer())) == 0


def test_copies_take_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylmm.models.prepacked.PREPACKED_AT_MOST", 5 * 1100 * 256 * 4)
    many = nn.Sequential(*(layer() for _ in range(4)))
    assert prepack(many) == 2 and [prepacked(one) is not None for one in many] == [True, True, False, False]


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_head_and_its_loss_are_the_plain_ones(bias: bool) -> None:
    plain = layer(140, 2000, bias)
    fast = copy.deepcopy(plain)
    assert prepack(nn.Sequential(fast)) == 1
    found: list[tuple[Tensor, Tensor | None]] = []
    for head in (plain, fast):
        hidden = torch.randn(50, 140, generator=torch.Generator().manual_seed(1)).requires_grad_()
        targets = torch.arange(50) * 7
        loss = fused_cross_entropy(head, Shaping(2.0, 30.0), hidden, targets, rows=16)
        loss.backward()
        found.append((loss.detach(), hidden.grad))
    assert len(packed(fast)[0]._copies) == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("name", NAMES)
def test_what_lies_under_a_frozen_llm_learns_what_it_learns_without(name: str) -> None:
    plain = tiny(name).train()
    without_dropout(plain)
    for part in (plain.llm, plain.vision_tower):
        part.requires_grad_(False)
    plain.llm.get_input_embeddings().weight.requires_grad_()
    fast = copy.deepcopy(plain)
    fast.set_attention("varlen")
    speed_up(fast, CPU)
    assert len(packed(fast.llm)) > 4 and packed(fast.vision_tower), "few layers are laid out"
    inputs = learnt_in_part()
    (loss, slopes), (found, ours) = step(plain, inputs), step(fast, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours, slopes, rtol=0, atol=2e-5 * float(slopes.abs().max()))


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("tune", ["pretrain", "finetune", "share", "lora"])
@pytest.mark.parametrize("llm", ["phi2", "tinyllama"])
def test_the_plan_counts_the_copies_that_there_are(llm: str, tune: str) -> None:
    spec, how = spec_of(llm, "siglip", "mlp"), TUNES[tune]
    model = build(spec).train()
    tuning(model, how)
    speed_up(model, CPU)
    tokens = model.image_tokens + 16
    ids = torch.tensor([[1] + [IMAGE_TOKEN_ID] * model.image_tokens + [5] * 15])
    targets = torch.full_like(ids, -100)
    targets[:, -8:] = 7
    pixels = torch.randn(1, 3, product.SIZE, product.SIZE)
    model(ids, torch.arange(tokens)[None], targets, pixel_values=pixels).loss_sum.backward()
    held = sum(len(one._copies) * one.layer.weight.numel() * 4 for one in packed(model))
    batch = MicroBatch(tokens, tokens, 8, 1, 1)
    placed: dict[str, Any] = {"compute_bytes": 4, "on_gpu": False}
    tuned = {part: written_out(one) for part, one in how.items()}
    counted = step_memory(parts_of(spec), tuned, batch, Placement(**placed)).caches
    assert counted == pytest.approx(held, rel=0.15) and (tune == "pretrain") <= (held > 0)
