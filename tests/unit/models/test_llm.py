"""Loading LLMs: `llm=hf` finds out what it got, and a checkpoint that is not what the spec says is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.builders import tiny_tower
from tests.unit.models.llms import tiny_llm
from tinylmm.errors import ConfigError, UserError
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.llm import (
    PACKS,
    HubCausalLM,
    decoder_of,
    examine,
    head_logits,
    llm_attention,
    load_llm,
    random_llm,
)
from tinylmm.models.lmm import LMM
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.tuning import decoder_blocks

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
LLAMA = {**SMALL, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

ANY_LLMS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64},
    "gpt_neox": SMALL,
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
            "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "cohere": {**SMALL, "logit_scale": 0.0625},
    "granite": {**SMALL, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 2},
    "olmo2": SMALL,
    "openelm": {"model_dim": 32, "num_transformer_layers": 2, "head_dim": 8, "vocab_size": 40},
}  # fmt: skip


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_dropout=0.0)).save_pretrained(
        tmp_path / "m"
    )
    return tmp_path / "m"


@pytest.mark.parametrize("model_type", ANY_LLMS)
def test_any_causal_lm_can_be_taken_apart(model_type: str, tmp_path: Path) -> None:
    made = random_llm(HubCausalLM, {"model_type": model_type, **ANY_LLMS[model_type]}, "auto")
    made.save_pretrained(tmp_path)
    llm = load_llm(HubCausalLM, tmp_path, None, "auto", {})
    assert type(llm) is type(made)
    own, packs = llm.config._attn_implementation, getattr(llm, PACKS)
    assert (own in packs) == (model_type != "opt"), "OPT's attention knows nothing of positions that restart"
    assert "flash_attention_2" in packs
    ids = torch.arange(9).unsqueeze(0)
    embeddings = llm.get_input_embeddings()(ids)
    hidden = decoder_of(llm)(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    torch.testing.assert_close(head_logits(llm, hidden), made.eval()(input_ids=ids).logits)
    assert len(decoder_blocks(llm)) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 4}, "takes no position_ids"),
    "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40}, "takes no position_ids"),
    "bert": ({**SMALL, "is_decoder": True}, "than its head does|image features"),
    "vit": ({"hidden_size": 32}, "no causal language model of"),
    "none_such": ({}, "knows no model of type 'none_such', and code that comes with a checkpoint is never run"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_reason(model_type: str) -> None:
    fields, reason = REFUSED[model_type]
    with pytest.raises(UserError, match=reason):
        random_llm(HubCausalLM, {"model_type": model_type, **fields}, "auto")


def test_logits_that_are_more_than_the_heads_are_noticed() -> None:
    class Doubling(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(UserError, match="Doubling does more to its logits than its head does"):
        examine(Doubling(transformers.LlamaConfig(**LLAMA)))


def test_an_lmm_knows_whether_samples_may_share_rows() -> None:
    torch.manual_seed(0)
    for model_type in ("opt", "llama"):
        llm = random_llm(HubCausalLM, {"model_type": model_type, **ANY_LLMS[model_type]}, "auto")
        tower = tiny_tower()
        width = llm.get_input_embeddings().weight.shape[1]
        assert LMM(llm, tower, MLPConnector(tower.hidden_size, width), "llama").packs == (model_type == "llama")


def test_a_checkpoints_code_is_never_asked_for(llama_folder: Path) -> None:
    fields = json.loads((llama_folder / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (llama_folder / "config.json").write_text(json.dumps(fields))
    (llama_folder / "evil.py").write_text("raise SystemExit('ran')\n")
    llm = load_llm(HubCausalLM, llama_folder, None, "auto", {})
    assert type(llm) is transformers.LlamaForCausalLM and not hasattr(llm.config, "auto_map")


@torch.no_grad()
def test_generation_settings_of_a_checkpoint_bend_no_answer(llama_folder: Path) -> None:
    made = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    made.generation_config.update(
        repetition_penalty=50.0, no_repeat_ngram_size=1, max_new_tokens=1, eos_token_id=[2, 3]
    )
    made.save_pretrained(llama_folder)
    llm = load_llm(HubCausalLM, llama_folder, None, "auto", {})
    assert llm.generation_config.eos_token_id == [2, 3]
    ids = [5, 6]
    for _ in range(8):
        ids.append(int(made(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert len(set(ids[2:])) < 8, "a repetition is what this is about"
    embeddings = llm.get_input_embeddings()(torch.tensor([[5, 6]]))
    assert (
        llm.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False, eos_token_id=40)[0].tolist()
        == ids[2:]
    )


def test_dropout_is_the_specs_and_the_rest_must_be_the_checkpoints(llama_folder: Path) -> None:
    free = {"max_position_embeddings": 99, "eos_token_id": 7, "initializer_range": 0.5}
    llm = load_llm(
        transformers.LlamaForCausalLM, llama_folder, None, "auto", {**LLAMA, **free, "attention_dropout": 0.25}
    )
    assert llm.config.attention_dropout == 0.25 and llm.model.layers[0].self_attn.attention_dropout == 0.25
    assert llm.config.max_position_embeddings == 2048 and llm.config.eos_token_id == 2
    wrong = {**LLAMA, "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(UserError) as caught:
        load_llm(transformers.LlamaForCausalLM, llama_folder, None, "auto", wrong)
    text = str(caught.value)
    assert "num_hidden_layers is 3 in llm.architecture and 2 in the checkpoint" in text
    assert "'rope_theta': 500000.0" in text and "'rope_theta': 10000.0" in text and "llm=hf" in text
    assert "vocab_size" not in text


@pytest.mark.parametrize(
    ("field", "reason"),
    [("hidden_size", "is no LlamaConfig: .*hidden_size"), ("resid_pdrop", "resid_pdrop is wide in")],
)
def test_a_field_of_the_wrong_type_or_name_is_no_architecture(field: str, reason: str, llama_folder: Path) -> None:
    with pytest.raises(UserError, match=reason):
        load_llm(transformers.LlamaForCausalLM, llama_folder, None, "auto", {**LLAMA, field: "wide"})


def test_a_checkpoint_of_another_kind_is_refused(llama_folder: Path) -> None:
    with pytest.raises(UserError, match=r"a model of type 'llama', but llm\._target_ is PhiForCausalLM \('phi'\)"):
        load_llm(transformers.PhiForCausalLM, llama_folder, None, "auto", {})


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        load_llm(HubCausalLM, tmp_path, None, "auto", {})


def test_random_weights_need_to_know_of_what() -> None:
    with pytest.raises(ConfigError, match="model_type"):
        random_llm(HubCausalLM, {}, "auto")


def test_a_soft_cap_on_scores_rules_sdpa_out() -> None:
    llm = tiny_llm("gemma2_2b")
    assert llm.config._attn_implementation == "eager"
    assert llm_attention(type(llm), llm.config, "flash_attention_2") == "eager", "until it computes on a GPU"
    with pytest.raises(UserError, match=r"launch\.attention is sdpa, but Gemma2ForCausalLM caps its attention scores"):
        llm_attention(type(llm), llm.config, "sdpa")
    assert tiny_llm("gemma3_1b").config._attn_implementation == "sdpa"
    assert llm_attention(OpenELMForCausalLM, tiny_llm("openelm").config, "sdpa") == "sdpa"
