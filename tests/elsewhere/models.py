"""Random models for other programs: of every kind of LLM and tower, and as large as they need them to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.builders import LLAMA, VISION
from tests.unit.convert.test_hf import loaded_with
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector

WIDTH = 64
TANH = "gelu_pytorch_tanh"
SHAPE = LLAMA | {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
"""Heads of 32 channels: vLLM's attention on a CPU takes none that are smaller."""
HEADS = {"head_dim": 32, "hidden_act": TANH, "hidden_activation": TANH}
CLIP = {"kind": "clip", "mode": "center_crop", "select_layer": 1}


def of(
    kind: Callable[..., nn.Module], config: Callable[..., Any], llm: dict[str, Any], /, **parts: Any
) -> Callable[[], LoadedModel]:
    """A model that answers of each picture otherwise; at their own scale random weights repeat the question's last token."""

    def make() -> LoadedModel:
        torch.manual_seed(3)
        made = kind(config(**SHAPE | llm))
        counts_from_zero = "gemma" in config.model_type  # the scale of its norms
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(0, 0.12 if parameter.dim() > 1 else 0.1)
                if name.endswith("norm.weight") and not counts_from_zero:
                    parameter.add_(1)
                # sharp attention turns the rounding of a Gemma's long vectors into other answers
                if ("q_proj.weight" in name or "k_proj.weight" in name) and not counts_from_zero:
                    parameter.mul_(4)
                if "embed" in name:
                    parameter.mul_(0.3 / (WIDTH**0.5 if counts_from_zero else 1))
            if getattr(made.lm_head, "bias", None) is not None:
                made.lm_head.bias.mul_(5)
        connector = MLPConnector(VISION["hidden_size"], WIDTH)
        with torch.no_grad():
            for parameter in connector.parameters():
                parameter.mul_(6)
        return loaded_with(made, connector=connector, **parts)

    return make


GEMMA2 = HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 24, "final_logit_softcapping": None}
MODELS: dict[str, Callable[[], LoadedModel]] = {
    "llama-siglip": of(LlamaForCausalLM, LlamaConfig, {}),
    "llama-clip-cls": of(LlamaForCausalLM, LlamaConfig, {}, **CLIP | {"select": "all"}),
    "qwen2-clip": of(Qwen2ForCausalLM, Qwen2Config, {}, **CLIP),
    "tied-qwen2-siglip-pad": of(
        Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}, mode="pad", drop_first_token=True
    ),
    "qwen3-siglip": of(Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "gemma-siglip": of(GemmaForCausalLM, GemmaConfig, HEADS),
    "gemma2-siglip": of(Gemma2ForCausalLM, Gemma2Config, GEMMA2),
    "gemma3-siglip": of(Gemma3ForCausalLM, Gemma3TextConfig, GEMMA2),
    "stablelm-clip": of(StableLmForCausalLM, StableLmConfig, {"use_qkv_bias": True}, **CLIP),
    "phi2-siglip": of(PhiForCausalLM, PhiConfig, {"num_key_value_heads": 2}),
}
