"""FLOPs counted from shapes are those that PyTorch counts while the real classes run, to 2 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import build, tuning
from tests.unit.models import test_product as product
from tests.unit.sizing.test_parameters import LORA, parts_of, towers_of, written_out
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.sizing.flops import Flops, Sample, block_forward, first_pass_flops, sample_flops

TEXT, SUPERVISED = 24, 9
TUNES: dict[str, dict[str, Any]] = {
    "pretrain": {"llm": "frozen", "vision_tower": "frozen", "connector": "full"},
    "finetune": {"llm": "full", "vision_tower": "frozen", "connector": "full"},
    "share": {"llm": "full", "vision_tower": {"from_layer": 0.5}, "connector": "full"},
    "full": {"llm": "full", "vision_tower": "full", "connector": "full"},
    "lora": {"llm": LORA, "vision_tower": "frozen", "connector": "full"},
    "tower_lora": {"llm": LORA, "vision_tower": LORA, "connector": "full"},
    "half_the_llm": {"llm": {"from_layer": 1}, "vision_tower": "frozen", "connector": "frozen"},
}
KINDS = [
    *((llm, "siglip", "mlp") for llm in product.LLMS),
    *(("tinyllama", tower, "linear") for tower in product.TOWERS),
    *(("qwen2_0_5b", towers_of(name), name) for name in product.CONNECTORS),
]


def spec_of(*kind: str) -> dict[str, Any]:
    """Tiny parts, and a tower of which both blocks run."""
    spec = product.spec_of(*kind)
    spec["vision_tower"] |= {"select_layer": -1}
    spec["tower_output"] |= {"select_layer": -1}
    return spec


GROUPED = ("ldp", "ldp_v2")
"""PyTorch counts the weight gradient of their depthwise convolutions as if every channel met every other."""


def cases() -> list[tuple[tuple[str, str, str], str]]:
    """Without: a model of which nothing is trained, and adapters on two encoders side by side (of whose first layers in this
    tiny tower of two blocks one gradient too many is counted)."""
    untrained, doubled = [("identity", "pretrain")], [("mof", "tower_lora")]
    every = [(kind, tune) for kind in dict.fromkeys(KINDS) for tune in TUNES]
    return [(k, tune) for k, tune in every if (k[2], tune) not in untrained and (k[1], tune) not in doubled]


@pytest.mark.parametrize(("kind", "tune"), cases(), ids=["-".join((*kind, tune)) for kind, tune in cases()])
def test_flops_of_a_sample_are_those_that_torch_counts(kind: tuple[str, str, str], tune: str) -> None:
    spec, how = spec_of(*kind), TUNES[tune]
    model = build(spec).train()
    tuning(model, how)
    tokens = model.image_tokens + TEXT
    ids = torch.tensor([[1] + [IMAGE_TOKEN_ID] * model.image_tokens + [5] * (TEXT - 1)])
    targets = torch.full_like(ids, -100)
    targets[0, -SUPERVISED:] = 7
    pixels = torch.randn(1, 3, product.SIZE, product.SIZE)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch counts nothing of its fused attention on a CPU
        with FlopCounterMode(display=False) as forward:
            # Head and loss apart: as one, they would make the head's gradients in the forward pass.
            loss = model(ids, torch.arange(tokens)[None], targets, pixel_values=pixels, loss_chunks=1).loss_sum
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    sample = Sample(tokens, tokens**2, SUPERVISED, 1, dense=True)
    found = sum(
        sample_flops(parts_of(spec), {part: written_out(one) for part, one in how.items()}, sample).values(), Flops()
    )
    assert found.forward == pytest.approx(forward.get_total_flops(), rel=0.02)
    if kind[2] not in GROUPED:
        assert found.backward == pytest.approx(backward.get_total_flops(), rel=0.02)


def phi2(tune: str, cached: bool = False) -> dict[str, Flops]:
    parts = parts_of(product.spec_of("phi2", "siglip", "mlp"))
    return sample_flops(parts, TUNES[tune], Sample.of_length(40, 9), cached)


def test_a_frozen_part_costs_no_gradient_of_weights_and_a_frozen_tower_none_at_all() -> None:
    frozen, full = phi2("pretrain"), phi2("finetune")
    assert frozen["llm"].weights == 0 < frozen["llm"].activations
    assert full["llm"].weights == pytest.approx(full["llm"].forward - attention_flops(full), rel=1e-9), (
        "attention has no weights"
    )
    assert frozen["vision_tower"].backward == 0 < frozen["vision_tower"].forward


def attention_flops(found: dict[str, Flops]) -> float:
    return found["llm"].activations - found["llm"].forward


def test_a_cached_tower_costs_its_first_pass_alone() -> None:
    parts = parts_of(product.spec_of("phi2", "siglip", "mlp"))
    assert phi2("pretrain", cached=True)["vision_tower"].total == 0
    assert first_pass_flops(parts, 1) == phi2("pretrain")["vision_tower"].forward


def test_causal_attention_counts_pairs_that_see_each_other() -> None:
    assert Sample.of_length(10, 1).pairs(None) == 55
    assert Sample.of_length(10, 1).pairs(3) == 1 + 2 + 8 * 3
    assert Sample(10, 100, 1, 1, dense=True).pairs(3) == 100


def test_checkpointing_takes_the_blocks_forward_pass_once_more() -> None:
    parts = parts_of(product.spec_of("phi2", "siglip", "mlp"))
    sample = Sample.of_length(40, 0)
    found = block_forward(parts, TUNES["finetune"], sample)
    assert found == phi2("finetune")["llm"].forward - 2 * 9 * parts["llm"].width * 131
