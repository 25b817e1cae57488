"""Random models of every kind that llama.cpp reads, and its tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.builders import LLAMA, WIDTH, redescribe
from tests.elsewhere.models import TANH, random_llm
from tests.unit.convert.test_hf import loaded_with
from tests.unit.convert.tokenizers import TOKENIZERS
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig

HEADS = {"head_dim": 8, "hidden_activation": TANH}
GEMMA2 = HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 24}
OPENELM = {
    "vocab_size": LLAMA["vocab_size"],
    "num_transformer_layers": 3,
    "model_dim": WIDTH,
    "head_dim": 8,
    "qkv_multipliers": [0.5, 1.0],
    "num_gqa_groups": 2,
    "ffn_multipliers": [0.5, 4.0],
    "ffn_dim_divisor": 16,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "max_context_length": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def drawn(llm: nn.Module) -> nn.Module:
    """Weights large enough that answers differ; norms and biases of ones and zeros would hide what is done to them."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(parameter * 3 if parameter.dim() > 1 else parameter + 0.3 * torch.randn(parameter.shape))
    return llm


def of(kind: str, **more: Any) -> Callable[[], LoadedModel]:
    return lambda: loaded_with(drawn(random_llm(kind, **more)), mode="pad")


def with_tokenizer(name: str) -> LoadedModel:
    tokenizer = TOKENIZERS[name]()
    loaded = of("Llama", vocab_size=len(tokenizer) + 5)()
    loaded.tokenizer = tokenizer
    with torch.no_grad():  # special tokens, and bytes that are no text, are shown in other ways by the two programs
        for token, number in tokenizer.get_vocab().items():
            if token.startswith("<"):
                loaded.model.llm.lm_head.weight[number] = 0
    return loaded


def openelm() -> LoadedModel:
    torch.manual_seed(3)
    loaded = loaded_with(drawn(OpenELMForCausalLM(OpenELMConfig(**OPENELM))), mode="pad")
    redescribe(loaded, llm={"_target_": "tinylmm.models.openelm.OpenELMForCausalLM"})
    return loaded


MODELS: dict[str, Callable[[], LoadedModel]] = {
    "llama": of("Llama"),
    "llama3": of("Llama", rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True),
    "qwen2": of("Qwen2", tie_word_embeddings=True),
    "qwen3": of("Qwen3", head_dim=16),
    "gemma": of("Gemma", **HEADS),
    "gemma2": of("Gemma2", **GEMMA2),
    "gemma3": of("Gemma3", **GEMMA2 | {"num_hidden_layers": 7}),
    "phi2": of("Phi", num_key_value_heads=4),
    "stablelm2": of("StableLm", use_qkv_bias=True),
    "openelm": openelm,
    "llama-2-tokenizer": lambda: with_tokenizer("llama-2"),
    "nano-tokenizer": lambda: with_tokenizer("nano"),
}
