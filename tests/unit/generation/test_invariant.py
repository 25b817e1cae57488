"""Narrow types keep the promise when rows are computed apart: the same answers at batch 1, 64 and alone, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.builders import LLAMA, tiny_lmm
from tests.unit.generation.test_engine import ENDS, GREEDY, answers, ask, model_of, pixels, reference
from tinylmm.generation import invariant
from tinylmm.generation.choose import Chooser, Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.invariant import BLOCK, can_be_invariant, invariant_rows, rows_agree
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig

OPENELM = {"vocab_size": 320, "model_dim": 32, "num_transformer_layers": 2, "head_dim": 8, "ffn_dim_divisor": 8}
OPENELM |= {"num_gqa_groups": 2, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0]}  # type: ignore[dict-item]
FAMILIES = {
    "llama": lambda: tiny_lmm().llm,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**LLAMA)),
    "openelm": lambda: OpenELMForCausalLM(OpenELMConfig(**OPENELM)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_answers_are_equal_in_any_batch_and_alone(family: str) -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES[family]()).to(torch.bfloat16)  # type: ignore[arg-type, no-untyped-call]
    prompts = ask(model)
    before = model.config._attn_implementation
    engines = [Engine(model, pixels, ENDS, GREEDY, rows=rows, invariant=True) for rows in (64, 1, 5)]
    assert all(engine.exact for engine in engines)
    many, one, few = (answers(engine, prompts) for engine in engines)
    assert many == one == few and len({tuple(ids) for ids in many.values()}) > 5
    assert many == answers(Engine(model, pixels, ENDS, GREEDY, rows=64, share=False, invariant=True), prompts)
    assert many["one-3"] == list(engines[0].stream(next(p for p in prompts if p.item_id == "one-3")))
    with invariant_rows(model):
        assert many == {prompt.item_id: reference(model, prompt) for prompt in prompts}
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_linear_layers_whose_kernels_disagree_take_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernels do, a row comes out the same beside 0 and beside 200 others, and as it should."""
    monkeypatch.setattr(invariant, "rows_agree", lambda layer: False)
    model = tiny_lmm().eval()
    layer = next(module for module in model.llm.modules() if isinstance(module, nn.Linear))
    rows = torch.randn(201, layer.in_features)
    plain = layer(rows)
    seen: list[int] = []
    real = torch.nn.functional.linear
    with invariant_rows(model):
        monkeypatch.setattr(invariant.F, "linear", lambda x, *more: seen.append(len(x)) or real(x, *more))
        whole = layer(rows[None])[0]
        assert torch.equal(layer(rows[:1]), whole[:1]) and torch.equal(layer(rows[:70]), whole[:70])
    assert set(seen) == {BLOCK}
    torch.testing.assert_close(whole, plain)


def test_rows_that_depend_on_their_neighbours_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(16, 8)
    real = torch.nn.functional.linear
    monkeypatch.setattr(invariant.F, "linear", lambda x, *more: real(x, *more) + (1e-6 if len(x) < 20 else 0))
    assert not rows_agree(layer)
    monkeypatch.setattr(invariant.F, "linear", lambda x, *more: x[:, :8] * 2)
    assert rows_agree(layer)


def test_capped_attention_scores_have_no_such_form() -> None:
    model = model_of(Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8)))  # type: ignore[arg-type]
    assert not can_be_invariant(model)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its attention scores"):
        list(Engine(model, pixels, ENDS, GREEDY, invariant=True).replies(ask(model)))


def test_of_exact_ties_the_first_is_chosen() -> None:
    logits = torch.zeros(3, 400, dtype=torch.bfloat16)
    logits[0, [7, 30, 200]] = 1.0
    logits[1, [399, 12]] = 2.0
    logits[2, 5] = 1.0
    choose = Chooser(Sampling(), 3, torch.device("cpu"))
    tokens, doubts = choose(logits, [0, 1, 2], [[], [], []])
    assert tokens.tolist() == [7, 12, 5] and doubts == [False] * 3
