"""What memory is made of: each term is arithmetic on parameters, and moves as the launch does.

`benchmarks/planner.py` holds the sum against measured peaks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import planner
from tests.builders import build, tuning
from tests.unit.models import test_product as product
from tests.unit.sizing.test_flops import SUPERVISED, TEXT, TUNES
from tests.unit.sizing.test_parameters import LORA, parts_of, written_out
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.models.fused import fuse
from tinylmm.sizing.flops import PARTS
from tinylmm.sizing.layers import Linear
from tinylmm.sizing.memory import BUCKET, CONTEXT, MicroBatch, Placement, kept_bytes, step_memory
from tinylmm.sizing.parameters import total_parameters, trained_parameters

BATCH = MicroBatch(tokens=512, row=256, supervised=64, images=4, features=4, pixels=768, masked=True)
PARTS_OF_PHI = parts_of(product.spec_of("phi2", "siglip", "mlp"))
FINETUNE = TUNES["finetune"]
GPU = Placement()
TRAINED = sum(trained_parameters(PARTS_OF_PHI[name], FINETUNE[name]) for name in PARTS)
TOWER = total_parameters(PARTS_OF_PHI["vision_tower"])


def memory(**changes: Any) -> Any:
    return step_memory(PARTS_OF_PHI, FINETUNE, BATCH, replace(GPU, **changes))


def test_locally_trained_weights_are_fp32_and_frozen_ones_are_not() -> None:
    found = memory()
    assert found.weights == 4 * TRAINED + 2 * TOWER
    assert (found.gradients, found.optimizer) == (4 * TRAINED, 8 * TRAINED)
    assert found.caches == 2 * TRAINED + 4 * 768 * 4, "autocast's copies, and the images"
    assert memory(on_gpu=False, compute_bytes=4).weights == 4 * (TRAINED + TOWER)


def test_ddp_holds_gradients_twice_and_zero_shares_them_out() -> None:
    assert memory(sharding="ddp", ranks=2).gradients == 2 * memory().gradients
    bucket = min(TRAINED, BUCKET) * 4
    zero2 = memory(sharding="zero2", ranks=4)
    assert (zero2.gradients, zero2.optimizer) == (TRAINED + bucket, 2 * TRAINED)
    assert zero2.weights == 2 * (TRAINED + TOWER) + TRAINED
    zero3 = memory(sharding="zero3", ranks=4)
    assert zero3.weights == (TRAINED + TOWER) / 2 + TRAINED
    assert zero3.optimizer == zero2.optimizer and zero3.caches > zero2.caches


def test_a_frozen_llm_in_eight_bits_takes_a_byte_less_a_weight_of_its_linear_layers() -> None:
    frozen = {"llm": "frozen", "vision_tower": "frozen", "connector": "full"}
    plain, held = (
        step_memory(PARTS_OF_PHI, frozen, BATCH, replace(GPU, eight_bits=eight)).weights for eight in (False, True)
    )
    layers = [layer for layer in PARTS_OF_PHI["llm"].layers() if isinstance(layer, Linear)]
    assert layers and plain - held == sum(
        layer.inputs * layer.outputs for layer in layers if layer.inputs % 16 == layer.outputs % 16 == 0
    )
    assert plain > held


def test_a_step_of_one_micro_batch_has_its_gradients_when_its_activations_are_gone() -> None:
    many, one = memory(), memory(accumulates=False)
    assert min(one.gradients, one.logits) == 0
    assert one.total < many.total


def test_adapters_on_quantised_weights_take_half_a_byte_of_each() -> None:
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "bias": "none"}
    whole, held = ({"llm": {how: lora}, "vision_tower": "frozen", "connector": "full"} for how in ("lora", "qlora"))
    saved = step_memory(PARTS_OF_PHI, whole, BATCH, GPU).weights - step_memory(PARTS_OF_PHI, held, BATCH, GPU).weights
    linear = sum(
        layer.inputs * layer.outputs
        for block in PARTS_OF_PHI["llm"].blocks
        for layer in block
        if hasattr(layer, "inputs")
    )
    assert saved == pytest.approx(linear * (2 - 0.516))


def test_checkpointing_and_flash_attention_keep_less() -> None:
    assert memory(checkpointing=True).activations < memory().activations
    bounds = replace(BATCH, masked=False)
    assert step_memory(PARTS_OF_PHI, FINETUNE, bounds, GPU).activations < memory().activations


def test_a_card_has_a_context_and_a_cpu_none() -> None:
    assert memory().fragmentation > CONTEXT
    assert memory(on_gpu=False).fragmentation == 0


@pytest.mark.parametrize("name", planner.cases())
def test_the_measured_peaks_are_predicted_to_a_fifth(name: str) -> None:
    """Of the record that `python -m benchmarks.planner` has written: what was measured there, and what is predicted now."""
    measured = json.loads(planner.RESULT.read_text(encoding="utf-8"))["cases"][name]["measured_mib"]
    llm, tune, accumulation, checkpointing = planner.cases()[name]
    found = planner.predict(planner.spec_of(llm), planner.TUNES[tune], accumulation, checkpointing)
    assert found.total / 2**20 == pytest.approx(measured, rel=0.2)


KEPT_TUNES = {name: TUNES[name] for name in ("pretrain", "finetune", "share", "lora")}
KEPT_TUNES["lora_dropout"] = TUNES["lora"] | {"llm": {"lora": LORA["lora"] | {"dropout": 0.05}}}


@pytest.mark.parametrize("tune", KEPT_TUNES)
@pytest.mark.parametrize("llm", product.LLMS)
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(llm: str, tune: str) -> None:
    """Fp32 on the CPU, every storage once, without the parameters and the loss's own: to 15 % of these tiny models."""
    spec, how = product.spec_of(llm, "siglip", "mlp"), KEPT_TUNES[tune]
    spec["vision_tower"] |= {"select_layer": -1}
    spec["tower_output"] |= {"select_layer": -1}
    model = build(spec).train()
    tuning(model, how)
    for part in (model.llm, model.vision_tower):  # as every training does
        fuse(part, on_cpu=False)
    rows, tokens = 2, model.image_tokens + TEXT
    ids = torch.tensor([[1] + [IMAGE_TOKEN_ID] * model.image_tokens + [5] * (TEXT - 1)] * rows)
    positions = torch.arange(tokens).repeat(rows, 1)
    positions[:, -8:] -= tokens - 8
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings, _ = model.embed(ids, torch.randn(rows, 3, product.SIZE, product.SIZE), None)
        hidden = model.llm.get_decoder()(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    found = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    batch = MicroBatch(rows * tokens, tokens, SUPERVISED, rows, rows, masked=True)
    tuned = {part: written_out(one) for part, one in how.items()}
    placed = Placement(compute_bytes=4, on_gpu=False)
    assert kept_bytes(parts_of(spec), tuned, batch, placed) == pytest.approx(found, rel=0.15)
