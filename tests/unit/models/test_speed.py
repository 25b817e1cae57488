"""A model that is made faster learns what it learns without: every LLM, samples end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.unit.models.llms import NAMES, tiny
from tests.unit.models.test_attention import CPU, batch, samples, step, without_dropout
from tinylmm.models import by_sample
from tinylmm.models.compiled import compile_blocks, graphs_compiled
from tinylmm.models.fused import NEEDED, _AtPositions
from tinylmm.models.layout import layout_of
from tinylmm.models.lmm import LMM
from tinylmm.models.speed import speed_up
from tinylmm.models.tuning import decoder_blocks, enable_checkpointing


def learnt_in_part() -> dict[str, Tensor]:
    """Samples of which the last third is learnt, end to end."""
    made = batch(samples(), 400, packing=True)
    made["targets"][:, ::3] = -100
    made["targets"][:, : made["targets"].shape[1] // 3] = -100
    return made


def taken_over(model: LMM) -> int:
    return sum(isinstance(module.forward, _AtPositions) for module in model.modules())


@pytest.mark.parametrize("narrowest", [0, 512], ids=["in blocks", "at once"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_faster_model_learns_what_the_plain_one_learns(
    name: str, checkpointing: bool, narrowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sample, "NARROWEST", narrowest)
    plain = tiny(name).train()
    without_dropout(plain)
    fast = copy.deepcopy(plain)
    fast.set_attention("varlen")
    speed_up(fast, CPU)
    assert taken_over(fast) >= 2 and list(fast.state_dict()) == list(plain.state_dict())
    told = [module for module in fast.modules() if hasattr(module, NEEDED)]
    assert len(told) == fast.by_samples and all(module in decoder_blocks(fast.llm)[-1].children() for module in told)
    if checkpointing:
        enable_checkpointing(fast)
    inputs = learnt_in_part()
    loss, gradients = step(plain, inputs)
    layout = layout_of(inputs["input_ids"], inputs["position_ids"], inputs["targets"])
    for found, slopes in (step(fast, inputs), step(fast, inputs | {"layout": layout})):
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(slopes, gradients, rtol=0, atol=1e-5 * float(gradients.abs().max()))


def test_compiled_blocks_learn_the_same_and_lengths_are_compiled_once() -> None:
    plain = tiny("nano").train()
    without_dropout(plain)
    fast = copy.deepcopy(plain)
    fast.set_attention("varlen")
    speed_up(fast, CPU)
    assert compile_blocks(fast) == len(decoder_blocks(fast.llm)) - 1 + len(fast.vision_tower.blocks)
    counts = []
    for cut in (0, 13, 29):
        inputs = {name: tensor[:, : tensor.shape[1] - cut] for name, tensor in learnt_in_part().items()}
        loss, gradients = step(plain, inputs)
        found, slopes = step(fast, inputs)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(slopes, gradients, rtol=0, atol=1e-5 * float(gradients.abs().max()))
        counts.append(graphs_compiled())
    assert counts[0] > 0 and counts[2] == counts[1], "another length is no other graph"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "name", ["phi2", "tinyllama", "qwen2_5_0_5b", "qwen3_0_6b", "stablelm2", "gemma", "openelm_270m"]
)
def test_on_a_gpu_a_compiled_step_in_bf16_is_as_near_as_the_plain_one(name: str) -> None:
    """Both against fp32: what is fast may be as far from it as what is plain, and half as far again."""
    exact = tiny(name).train().cuda()
    without_dropout(exact)
    plain, fast = copy.deepcopy(exact), copy.deepcopy(exact)
    fast.set_attention("varlen")
    speed_up(fast, torch.device("cuda"), "bf16")
    compile_blocks(fast)
    inputs = {key: tensor.cuda() for key, tensor in learnt_in_part().items()}
    loss, gradients = step(exact, inputs)
    far = {}
    for kind, model in (("plain", plain), ("fast", fast)):
        with torch.autocast("cuda", torch.bfloat16):
            found, slopes = step(model, inputs)
        assert abs(float(found - loss)) < 0.01 * float(loss)
        far[kind] = float((slopes - gradients).norm() / gradients.norm())
    assert far["fast"] < 1.5 * far["plain"] + 1e-3, far


def test_where_something_is_dropped_at_random_the_last_block_stays_whole() -> None:
    model = tiny("phi2").train()
    model.llm.get_decoder().layers[-1].mlp.fc2 = torch.nn.Sequential(
        model.llm.get_decoder().layers[-1].mlp.fc2, torch.nn.Dropout(0.5)
    )
    speed_up(model, CPU)
    kept = [name for name, module in model.named_modules() if isinstance(module.forward, _AtPositions)]
    assert not any(name.endswith("mlp") for name in kept) and any(name.endswith("dense") for name in kept)


def test_a_block_that_mixes_positions_behind_its_attention_stays_whole() -> None:
    model = tiny("tinyllama").train()
    mlp = model.llm.get_decoder().layers[-1].mlp

    class Mixing(type(mlp)):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + hidden.mean(-2, keepdim=True)

    mlp.__class__ = Mixing
    speed_up(model, CPU)
    assert taken_over(model) == 0


def test_with_nothing_to_learn_there_is_still_a_graph() -> None:
    model = tiny("tinyllama").train()
    model.set_attention("varlen")
    speed_up(model, CPU)
    inputs = learnt_in_part()
    inputs["targets"].fill_(-100)
    loss, gradients = step(model, inputs)
    assert float(loss) == 0.0 and not gradients.any()


def test_evaluation_computes_every_position() -> None:
    model = tiny("tinyllama")
    speed_up(model, CPU)
    model.needed.positions = torch.tensor([1])
    ids = torch.arange(12).view(1, 12) + 5
    found = model.llm(input_ids=ids, use_cache=False).logits
    model.needed.positions = None
    torch.testing.assert_close(model.llm(input_ids=ids, use_cache=False).logits, found)
