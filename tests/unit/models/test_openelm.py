"""OpenELM against a plain computation written from its paper, and Apple's files as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.models.llms import VOCAB, tiny_llm
from tinylmm.models.llm import HubCausalLM, load_llm
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig, make_divisible

OPENELM_270M = {  # of Apple's config.json
    "num_query_heads": [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20],
    "num_kv_heads": [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5],
    "ffn_multipliers": [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0],
}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(vector: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head's vector, pair by pair."""
    turned, half = vector.clone(), len(vector) // 2
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def plain_logits(weights: dict[str, Tensor], config: Any, ids: list[int]) -> Tensor:
    """One text, one head and one position at a time, from tensors under Apple's names."""
    hidden = weights["transformer.token_embeddings.weight"][ids]
    size = config.head_dim
    for layer, (heads, shared) in enumerate(zip(config.num_query_heads, config.num_kv_heads, strict=True)):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        qkv = (rms(hidden, w["attn_norm.weight"]) @ w["attn.qkv_proj.weight"].T).view(
            len(ids), heads + 2 * shared, size
        )
        mixed = torch.zeros(len(ids), heads * size)
        for head in range(heads):
            key_head = heads + head // (heads // shared)
            for i in range(len(ids)):
                query = turn(rms(qkv[i, head], w["attn.q_norm.weight"]), i)
                keys = [turn(rms(qkv[j, key_head], w["attn.k_norm.weight"]), j) for j in range(i + 1)]
                shares = torch.stack([query @ key / math.sqrt(size) for key in keys]).softmax(0)
                mixed[i, head * size : (head + 1) * size] = shares @ qkv[: i + 1, key_head + shared]
        hidden = hidden + mixed @ w["attn.out_proj.weight"].T
        gate, value = (rms(hidden, w["ffn_norm.weight"]) @ w["ffn.proj_1.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (gate * gate.sigmoid() * value) @ w["ffn.proj_2.weight"].T
    return rms(hidden, weights["transformer.norm.weight"]) @ weights["transformer.token_embeddings.weight"].T


@torch.no_grad()
def test_logits_equal_a_plain_computation_from_the_saved_tensors(tmp_path: Path) -> None:
    llm = tiny_llm("openelm").eval()
    for name, parameter in llm.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    llm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights, "as in Apple's files, the tied head is not written"
    ids = [1, 50, 7, 7, 99, 130]
    expected = plain_logits(weights, llm.config, ids)
    torch.testing.assert_close(llm(input_ids=torch.tensor([ids])).logits[0], expected, rtol=1e-4, atol=1e-4)
    assert len(set(llm.config.num_query_heads)) > 1, "layers must differ for this to mean anything"


def test_sdpa_and_eager_agree_on_packed_rows_and_left_padding() -> None:
    ids = torch.arange(3, 15).unsqueeze(0)
    packed = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]),
        "use_cache": False,
    }
    padded = {"input_ids": ids, "attention_mask": (torch.arange(12) > 3).long().unsqueeze(0)}
    sdpa, eager = tiny_llm("openelm").eval(), tiny_llm("openelm").eval()
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(sdpa(**packed).logits, eager(**packed).logits)
    torch.testing.assert_close(sdpa(**padded).logits[:, 4:], eager(**padded).logits[:, 4:])


def test_apples_own_config_and_tensors_load_as_they_are(tmp_path: Path) -> None:
    """A folder as Apple publishes it: code references, per-layer lists and fp32-less config, no head among the tensors."""
    llm = tiny_llm("openelm")
    state = {key: value.to(torch.bfloat16) for key, value in llm.state_dict().items() if key != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = llm.config.to_dict() | {
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "dtype"}, default=str))
    again, info = OpenELMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.lm_head.weight is again.transformer.token_embeddings.weight
    assert all(torch.equal(again.state_dict()[key].to(torch.bfloat16), value) for key, value in state.items())
    assert not hasattr(again.config, "auto_map")


def test_layers_have_the_published_heads_and_widths() -> None:
    shape = {"model_dim": 1280, "num_transformer_layers": 16, "head_dim": 64, "num_gqa_groups": 4}
    config = OpenELMConfig(**shape, qkv_multipliers=[0.5, 1.0], ffn_multipliers=[0.5, 4.0])
    assert {key: getattr(config, key) for key in OPENELM_270M} == OPENELM_270M
    assert [config.ffn_width(layer) for layer in (0, 1, 15)] == [768, 1024, 5120]
    uniform = OpenELMConfig(model_dim=256, num_transformer_layers=3, head_dim=64)
    assert uniform.num_query_heads == [4, 4, 4] and uniform.ffn_multipliers == [4.0] * 3


def test_a_width_is_never_rounded_down_by_more_than_a_tenth() -> None:
    assert [make_divisible(value, 256) for value in (1, 640, 383, 384, 1241.6)] == [256, 768, 512, 512, 1280]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ffn_multipliers": [1, 2, 3]}, "ffn_multipliers has 3 numbers"),
        ({"num_query_heads": [9] * 12}, "num_query_heads is"),
        ({"normalization_layer_name": "layer_norm"}, "rms_norm only"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OpenELMConfig(**fields)


def test_ungated_untied_and_labelled() -> None:
    """The options that Apple's releases do not use, but its config has."""
    torch.manual_seed(0)
    config = OpenELMConfig(
        vocab_size=VOCAB, model_dim=32, num_transformer_layers=2, head_dim=8, ffn_with_glu=False, ffn_dim_divisor=8
    )
    llm = OpenELMForCausalLM(config)
    assert (
        llm.transformer.layers[0].ffn.proj_1.weight.shape == (128, 32) and llm.transformer.layers[0].attn.q_norm is None
    )
    assert llm.lm_head.weight is not llm.transformer.token_embeddings.weight
    ids = torch.tensor([[5, 6, 7, 8]])
    output = llm(input_ids=ids, labels=torch.tensor([[-100, 6, -100, 8]]))
    picked = output.logits[0].log_softmax(-1)
    torch.testing.assert_close(output.loss, -(picked[0, 6] + picked[2, 8]) / 2)
    torch.testing.assert_close(llm(input_ids=ids, logits_to_keep=1).logits, output.logits[:, -1:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        llm()


def test_transformers_automatic_classes_know_it(tmp_path: Path) -> None:
    llm = tiny_llm("openelm").eval()
    llm.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32).eval()
    assert type(config) is OpenELMConfig and type(again) is OpenELMForCausalLM
    from_hub = load_llm(HubCausalLM, tmp_path, None, "auto", local_only=True)
    assert type(from_hub) is OpenELMForCausalLM
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, llm(input_ids=ids).logits)
