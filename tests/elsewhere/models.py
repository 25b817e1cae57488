"""Random models for other programs: of every kind of LLM and tower, and as large as they need them to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.builders import LLAMA, VISION
from tests.unit.convert.test_hf import loaded_with
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector

WIDTH = 64
TANH = "gelu_pytorch_tanh"
"""Published Gemmas say so by two names; of one alone transformers 4 and 5 make different functions."""
SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
"""Heads of 32 channels: vLLM's attention on a CPU takes none that are smaller."""
HEADS = {"head_dim": 32, "hidden_act": TANH, "hidden_activation": TANH}
CLIP = {"kind": "clip", "mode": "center_crop", "select_layer": 1}


def random_llm(kind: str, **options: Any) -> nn.Module:
    """A small LLM of transformers', with the random weights it begins with.

    Args:
        kind: as in `LlamaForCausalLM`.
        options: of its config, beside those of `builders.LLAMA`.
    """
    torch.manual_seed(3)
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    made: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config(**LLAMA | options))
    return made


def of(kind: str, /, llm: dict[str, Any] | None = None, **parts: Any) -> Callable[[], LoadedModel]:
    """A model that answers of each picture otherwise; at their own scale random weights repeat the question's last token."""

    def make() -> LoadedModel:
        made = random_llm(kind, **SHAPE | (llm or {}))
        counts_from_zero = "Gemma" in kind  # the scale of its norms
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(0, 0.12 if parameter.dim() > 1 else 0.1)
                if name.endswith("norm.weight") and not counts_from_zero:
                    parameter.add_(1)
                if "q_proj.weight" in name or "k_proj.weight" in name:
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
    "llama-siglip": of("Llama"),
    "llama-clip-cls": of("Llama", **CLIP | {"select": "all"}),
    "qwen2-clip": of("Qwen2", **CLIP),
    "tied-qwen2-siglip-pad": of("Qwen2", {"tie_word_embeddings": True}, mode="pad", drop_first_token=True),
    "qwen3-siglip": of("Qwen3", {"head_dim": 32}),
    "gemma-siglip": of("Gemma", HEADS),
    "gemma2-siglip": of("Gemma2", GEMMA2),
    "gemma3-siglip": of("Gemma3", GEMMA2),
    "stablelm-clip": of("StableLm", {"use_qkv_bias": True}, **CLIP),
    "phi2-siglip": of("Phi", {"num_key_value_heads": 2}),
}
