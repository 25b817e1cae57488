"""Attention: samples that share rows never see each other, under every implementation, and each runs where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from tests import flash
from tests.builders import record, tiny_lmm, tiny_loaded, tiny_tower
from tests.unit.models.llms import NAMES, VOCAB, choice, tiny
from tinylmm.config.recipe import TuneSpec
from tinylmm.data.collate import Collator
from tinylmm.errors import ConfigError, UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt
from tinylmm.models import attention
from tinylmm.models.attention import BY_SAMPLES, bounds_of, choose_attention, choose_training_attention
from tinylmm.models.checkpoint import load_model, save_model
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.llm import PACKS, HubCausalLM, examine, llm_attention, random_llm
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import apply_tuning, enable_checkpointing

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IMPLEMENTATIONS = ["auto", "varlen", "sdpa", "eager", "flash_attention_2"]
LENGTHS = (40, 7, 22, 11, 31, 9, 17, 13)


def batch(samples: list[dict[str, Any]], row_tokens: int, packing: bool) -> dict[str, Tensor]:
    made = Collator(4, 3, row_tokens, packing, None, 400)(samples)
    return {key: made[key] for key in ("input_ids", "position_ids", "targets")}


def samples() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [
        record(str(number), torch.randint(5, VOCAB, (length,), generator=draw).tolist(), length)
        for number, length in enumerate(LENGTHS)
    ]


def step(model: LMM, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and the gradients of all that is trained in the LLM, end to end."""
    model.zero_grad()
    loss = model(**inputs).loss_sum
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.llm.parameters() if p.grad is not None])


def _everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a modern GPU and flash-attn, whose kernels refuse what they cannot compute."""
    flash.install(monkeypatch)
    monkeypatch.setattr(flash, "attend", _refuse)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _refuse(*_: Any) -> Tensor:
    raise RuntimeError("FlashAttention only support fp16 and bf16 data type")


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("wanted", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_samples_in_shared_rows_learn_as_they_do_apart(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash.install(monkeypatch)
    model = tiny(name)
    kind = type(model.llm)
    if wanted == "sdpa" and choice(name)["architecture"].get("attn_logit_softcapping"):
        with pytest.raises(UserError, match="caps its attention scores"):
            llm_attention(kind, model.llm.config, wanted)
        return
    flash.use(model, wanted if wanted == flash.FLASH else llm_attention(kind, model.llm.config, wanted))
    model.train()
    without_dropout(model)
    enable_checkpointing(model)
    loss, gradients = step(model, batch(samples(), 60, packing=False))
    if wanted == "varlen":  # what comes before it has no bounds: eager or SDPA, with its masks
        model.set_attention(wanted)
        assert (model.config._attn_implementation == BY_SAMPLES) != attention.caps_scores(model.config)
    assert loss > sum(LENGTHS), "more than a nat a token is at stake"
    for row_tokens, rows in ((60, 3), (400, 1)):
        packed = batch(samples(), row_tokens, packing=True)
        assert (len(packed["input_ids"]) == 1) == (rows == 1) and (packed["targets"][:, -1] < 0).all()
        found, slopes = step(model, packed)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(slopes, gradients, rtol=0, atol=1e-4 * float(gradients.abs().max()))
    assert (calls["varlen"] > 0) == (wanted == flash.FLASH) and not calls["dense"]


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_computes_what_the_masks_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, soft caps, grouped heads and the padding at a row's end: the same numbers as eager attention's."""
    flash.install(monkeypatch)
    model = tiny(name)
    packed = batch(samples(), 60, packing=True)
    results = []
    for kind in ("eager", flash.FLASH):
        flash.use(model, kind)
        results.append(step(model, packed))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-4 * float(results[0][1].abs().max()))


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma3_270m", "openelm_270m", "phi2", "qwen3_0_6b", "stablelm2"])
def test_answers_under_flash_attention_are_those_of_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of many lengths, half of which begin alike: prefixes, batches and sliding caches."""
    flash.install(monkeypatch)
    model = tiny(name)
    draw = torch.Generator().manual_seed(3)
    common = tuple(torch.randint(5, VOCAB, (9,), generator=draw).tolist())
    prompts = [
        Prompt(str(n), common + tuple(torch.randint(5, VOCAB, (2 + n % 4,), generator=draw).tolist()), ())
        for n in range(8)
    ]
    answers = []
    for kind in ("eager", flash.FLASH):
        flash.use(model, kind)
        engine = Engine(model, lambda key: torch.empty(0), frozenset({2}), Sampling(max_new_tokens=6), rows=4)
        answers.append({r.item_id: r.ids for replies in engine.replies(prompts) for r in replies})
    assert answers[0] == answers[1]


def test_bounds_are_those_of_samples_and_of_padding() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10]])
    found = bounds_of(positions)
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 7, 8, 12, 18]
    assert found["max_length_k"] == 6


@pytest.mark.parametrize(("precision", "device"), [("fp32", GPU), ("fp32", CPU), ("bf16", CPU), ("fp16", CPU)])
def test_flash_attention_is_refused_where_it_cannot_compute(
    precision: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", precision, device) == "sdpa"
    with pytest.raises(ConfigError, match=rf"launch\.attention: .*{precision}.*attention=auto") as caught:
        choose_attention(flash.FLASH, precision, device)
    assert len(caught.value.faults) == 1


def test_flash_attention_is_chosen_where_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
        choose_attention(flash.FLASH, "bf16", GPU)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, chosen in (((8, 0), flash.FLASH), ((9, 0), flash.FLASH), ((7, 5), "sdpa")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_attention("auto", "bf16", GPU) == choose_attention("auto", "fp16", GPU) == chosen
    with pytest.raises(ConfigError, match="Tesla T4 is older than its kernels"):
        choose_attention(flash.FLASH, "fp16", GPU)
    assert choose_attention("eager", "bf16", GPU) == "eager"


def test_training_lays_samples_end_to_end_where_nothing_else_is_asked_for() -> None:
    for precision, device in (("fp32", CPU), ("bf16", GPU), ("fp32", GPU)):
        assert choose_training_attention("auto", precision, device) == "varlen"
        assert choose_training_attention("sdpa", precision, device) == "sdpa"
    with pytest.raises(ConfigError, match="fp32"):
        choose_training_attention(flash.FLASH, "fp32", CPU)
    assert choose_attention("varlen", "fp32", CPU) == "sdpa", "an evaluation has caches, which it knows nothing of"


def test_what_varlen_cannot_compute_stays_with_its_masks() -> None:
    dropping = LMM(tiny("tinyllama").llm, tiny_tower(), MLPConnector(24, 64), "llama")
    dropping.config.attention_dropout = 0.1
    for model in (dropping, tiny("gemma2_2b")):
        own = model.config._attn_implementation
        model.set_attention("varlen")
        assert model.config._attn_implementation == own != BY_SAMPLES
    deaf = examine(Deaf(transformers.LlamaConfig(**SMALL)))
    model = LMM(deaf, tiny_tower(), MLPConnector(24, 32), "llama")
    model.set_attention("varlen")
    assert model.config._attn_implementation == "sdpa" and model.packs


@pytest.mark.parametrize("wanted", IMPLEMENTATIONS)
def test_whatever_is_asked_for_a_model_is_loaded_with_what_the_cpu_has(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is put together, examined, looked at and cast in fp32 on the CPU before it goes to a GPU."""
    _everything_is_there(monkeypatch)
    loaded = tiny_loaded()
    save_model(loaded, tmp_path / "model", None, {})
    model = load_model(tmp_path / "model", [], wanted).model
    kinds = {module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)}
    assert kinds == {"eager" if wanted == "eager" else "sdpa"}
    fields = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 40,
    }
    random_llm(HubCausalLM, fields, wanted)
    for part in ("frozen", {"from_layer": 0.5}, "full"):
        apply_tuning(model, TuneSpec(llm="full", connector="full", vision_tower=part), 0, "bf16")


def test_a_model_with_flash_attention_can_be_tried_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    _everything_is_there(monkeypatch)
    for model in (tiny_lmm(), tiny("gemma2_2b")):
        flash.use(model, flash.FLASH)
        with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
            model.llm(input_ids=torch.ones(1, 3, dtype=torch.int64))
        examine(model.llm)
        apply_tuning(model, TuneSpec(llm="full", connector="full", vision_tower="full"), 0, "bf16")
        parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        assert {part.config._attn_implementation for part in parts} == {flash.FLASH}


def test_a_model_turns_to_flash_attention_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install(monkeypatch)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    for model in (tiny_lmm(), tiny("gemma2_2b")):
        parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        model.set_attention("sdpa")
        assert flash.FLASH not in {part.config._attn_implementation for part in parts}
        model.set_attention(flash.FLASH)
        assert {part.config._attn_implementation for part in parts} == {flash.FLASH}


def test_a_class_without_flash_attention_says_so_before_it_is_loaded() -> None:
    class Plain(transformers.LlamaForCausalLM):  # type: ignore[misc]
        _supports_flash_attn = False

    config = transformers.LlamaConfig()
    assert llm_attention(Plain, config, "auto") == "sdpa"
    with pytest.raises(UserError, match=r"launch\.attention is flash_attention_2, but Plain has no flash-attn"):
        llm_attention(Plain, config, flash.FLASH)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
}


class Deaf(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class whose attention is told neither positions nor bounds, so that flash-attn cannot keep samples apart."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self._forget, with_kwargs=True)

    @staticmethod
    def _forget(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        known = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
        return args, {key: value for key, value in kwargs.items() if key in known}


def test_a_class_that_flash_attention_cannot_keep_apart_does_not_share_rows_under_it() -> None:
    torch.manual_seed(0)
    for kind, packs in ((Deaf, {"sdpa"}), (transformers.LlamaForCausalLM, {"sdpa", flash.FLASH})):
        llm = examine(kind(transformers.LlamaConfig(**SMALL)))
        assert getattr(llm, PACKS) == packs and llm.config._attn_implementation == "sdpa"
        tower = tiny_tower()
        model = LMM(llm, tower, MLPConnector(tower.hidden_size, 32), "llama")
        assert model.packs
        flash.use(model, flash.FLASH)
        assert model.packs == (kind is not Deaf)


@pytest.mark.parametrize("name", NAMES)
def test_every_llm_is_found_to_share_rows(name: str) -> None:
    model = tiny(name)
    assert getattr(examine(model.llm), PACKS) == {model.llm.config._attn_implementation, flash.FLASH}


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a CUDA GPU and flash-attn")
@pytest.mark.parametrize("name", NAMES)
def test_samples_in_shared_rows_learn_as_they_do_apart_with_the_real_flash_attn(name: str) -> None:
    """The twin of the test above in bf16, whose rounding is about a hundredth."""
    model = tiny(name).to(GPU, torch.bfloat16)
    model.set_attention(choose_attention(flash.FLASH, "bf16", torch.device("cuda", 0)))
    assert model.llm.config._attn_implementation == flash.FLASH
    results = []
    for row_tokens, packing in ((60, False), (60, True), (400, True)):
        results.append(step(model, {key: t.to(GPU) for key, t in batch(samples(), row_tokens, packing).items()}))
    loss, gradients = results[0]
    for found, slopes in results[1:]:
        torch.testing.assert_close(found, loss, rtol=5e-3, atol=0)
        assert float((slopes - gradients).float().norm() / gradients.float().norm()) < 0.05
