"""Model FLOPs of a training step, counted from shapes (1 multiply-add = 2 FLOPs; causal attention at half)."""

from __future__ import annotations

from typing import Any


def _block_parameters(config: Any) -> int:
    """Matrix parameters of one decoder block."""
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    key_value = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    gated = config.hidden_act in ("silu", "gelu_pytorch_tanh") and config.model_type != "phi"
    return 2 * width * width + 2 * width * key_value + (3 if gated else 2) * width * config.intermediate_size


def tower_forward(config: Any, blocks: int) -> float:
    """FLOPs of one image through `blocks` blocks of a ViT."""
    patches = (config.image_size // config.patch_size) ** 2
    width = config.hidden_size
    linear = 2 * (4 * width * width + 2 * width * config.intermediate_size) * patches
    return blocks * (linear + 4 * patches * patches * width)


def sample_flops(
    llm: Any, tower: Any, tower_blocks: int, length: int, image_tokens: int, supervised: int, llm_trained: bool
) -> float:
    """Model FLOPs one sample needs: what the mathematics asks for, without recomputation.

    Args:
        length: tokens of the sample, image tokens counted in.
        supervised: positions whose logits are needed.
        llm_trained: whether the LLM's weights get gradients too; a frozen LLM needs activations' gradients only.
    """
    linear = 2 * _block_parameters(llm) * llm.num_hidden_layers * length
    attention = 2 * length * length * llm.hidden_size * llm.num_hidden_layers
    head = 2 * llm.hidden_size * llm.vocab_size * supervised
    connector = 2 * (tower.hidden_size * llm.hidden_size + llm.hidden_size**2) * image_tokens
    backward = (2 if llm_trained else 1) * linear + 2.5 * attention
    return (
        tower_forward(tower, tower_blocks)
        + linear
        + attention
        + backward
        + head * (3 if llm_trained else 2)
        + 3 * connector
    )
