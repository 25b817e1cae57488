"""A causal LM as llama.cpp's text model: which of its architectures it is, what that one cannot hold, keys and tensors.

What is said here of an architecture is what its graph computes in llama.cpp (src/models/), read at b10257.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tinylmm.convert.gguf_files import GGUFFile, gguf_package
from tinylmm.convert.tensors import Tensors
from tinylmm.models.openelm import NORM_EPS

SWIGLU, TANH = "SiLU", "tanh GELU"
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SWIGLU: F.silu,
    TANH: lambda x: F.gelu(x, approximate="tanh"),
}
_TIED, _OWN, _EITHER = "tied", "own", "either"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes for a class of LLMs.

    Attributes:
        name: llama.cpp's.
        activation: of its feed-forward layers.
        head: whether the output layer is the embedding table always, a matrix in the file always, or either.
        permuted: rotary positions turn neighbouring dimensions, not halves, so rows of queries and keys are put beside
            each other.
        shifted: norms multiply by the weight as it stands, where the class multiplies by one more.
        scales_all: what comes in is multiplied by the root of the width, image features too (Gemma 1 and 2).
        layer_norm: norms are LayerNorms, not RMSNorms.
        window: every how manieth layer sees the whole context, the others a sliding window; 0: all of them do.
    """

    name: str
    activation: str = SWIGLU
    head: str = _EITHER
    permuted: bool = False
    shifted: bool = False
    scales_all: bool = False
    layer_norm: bool = False
    window: int = 0


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permuted=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", TANH, _TIED, shifted=True, scales_all=True),
    "Gemma2ForCausalLM": Architecture("gemma2", TANH, _TIED, shifted=True, scales_all=True, window=2),
    "Gemma3ForCausalLM": Architecture("gemma3", TANH, _TIED, shifted=True, window=6),
    "PhiForCausalLM": Architecture("phi2", TANH, _OWN, layer_norm=True),
    "StableLmForCausalLM": Architecture("stablelm", head=_OWN, layer_norm=True),
    "OpenELMForCausalLM": Architecture("openelm", head=_TIED),
}
"""Class of the LLM -> what llama.cpp makes of it."""


def architecture_of(llm: nn.Module) -> Architecture | None:
    """llama.cpp's architecture of an LLM; None if there is none, or the class is somebody's own of the same name."""
    ours = type(llm).__module__.partition(".")[0] in ("transformers", "tinylmm")
    return ARCHITECTURES.get(type(llm).__name__) if ours else None


def text_obstacles(llm: Any) -> list[str]:
    """Return every reason why llama.cpp would compute something else than this LLM."""
    architecture, name = architecture_of(llm), type(llm).__name__
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"its language model is one that llama.cpp has and that is written here ({known}), and {name} is not"]
    return [f"{name}: {reason}" for reason in _differences(llm, architecture)]


def _differences(llm: Any, architecture: Architecture) -> Iterator[str]:
    config = llm.config
    probe = torch.linspace(-3, 3, 61)
    activations = {type(m): m for n, m in llm.named_modules() if re.search(r"\.(act|act_fn|activation_fn)$", n)}
    for module in activations.values():
        if not torch.allclose(module(probe), _ACTIVATIONS[architecture.activation](probe), atol=1e-6):
            yield f"llama.cpp's activation is {architecture.activation}, and this model's is {type(module).__name__}"
    head, table = llm.get_output_embeddings(), llm.get_input_embeddings()
    if architecture.head == _TIED and head.weight is not table.weight:
        yield "llama.cpp's output layer is the embedding table, and this model has one of its own"
    if architecture.name != "phi2" and getattr(head, "bias", None) is not None and bool(head.bias.any()):
        yield "llama.cpp's output layer has no bias, and this model's has"
    for option in ("qk_layernorm", "use_bidirectional_attention"):
        if getattr(config, option, False):
            yield f"it has {option}=true, which is not written here"
    if architecture.name.startswith(("gemma", "qwen3")) and getattr(config, "attention_bias", False):
        yield "llama.cpp's attention has no biases there, and this model's has"
    if architecture.name == "openelm" and not (config.ffn_with_glu and config.normalize_qk_projections):
        yield "llama.cpp's OpenELM has gated layers and normalised queries, and this one lacks either"
    yield from _position_differences(config, architecture)
    yield from _gemma_differences(config, architecture)


def _position_differences(config: Any, architecture: Architecture) -> Iterator[str]:
    for rotary in _rotary(config).values():
        kind = rotary.get("rope_type", "default")
        if kind != "default" and not (architecture.permuted and kind in ("llama3", "linear")):
            yield f"rotary positions of type '{kind}' are not written here"
    layers = list(getattr(config, "layer_types", None) or [])
    every = architecture.window
    windows = [every > 0 and number % every != every - 1 for number in range(len(layers))]
    if [kind == "sliding_attention" for kind in layers] != windows:
        which = f"all layers but every {every}th one see" if every else "no layer sees"
        yield f"in llama.cpp {which} a sliding window alone, and this model's layers are others"


def _gemma_differences(config: Any, architecture: Architecture) -> Iterator[str]:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if architecture.name in ("gemma2", "gemma3") and scalar != config.head_dim:
        yield f"llama.cpp divides attention scores by the root of head_dim ({config.head_dim}), this model by that of {scalar}"
    if architecture.name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "llama.cpp caps scores and logits, and this model does not"
    if architecture.name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        yield "llama.cpp caps no attention scores, and this model does"


def write_text_keys(llm: Any, file: GGUFFile) -> None:
    """Say of the LLM what llama.cpp needs to know."""
    architecture, config, writer = architecture_of(llm), llm.config, file.writer
    assert architecture is not None, "text_obstacles() lets nothing else through"
    heads = getattr(config, "num_query_heads", None) or config.num_attention_heads
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kv_heads = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    openelm = architecture.name == "openelm"
    layers = range(config.num_hidden_layers)
    writer.add_vocab_size(llm.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length([config.ffn_width(n) for n in layers] if openelm else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    eps = NORM_EPS if openelm else getattr(config, "layer_norm_eps" if architecture.layer_norm else "rms_norm_eps")
    (writer.add_layer_norm_eps if architecture.layer_norm else writer.add_layer_norm_rms_eps)(eps)
    if architecture.name == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if architecture.name.startswith("gemma") and getattr(config, key, None):
            getattr(writer, f"add_{key}")(getattr(config, key))
    if architecture.window:
        writer.add_sliding_window(config.sliding_window)
    _write_rotary_keys(config, width, architecture, file)


def _write_rotary_keys(config: Any, width: int, architecture: Architecture, file: GGUFFile) -> None:
    rotary = _rotary(config)
    whole = rotary["full_attention"]
    theta = whole.get("rope_theta", getattr(config, "rope_freq_constant", None))
    file.writer.add_rope_freq_base(theta)
    file.writer.add_rope_dimension_count(int(width * whole.get("partial_rotary_factor", 1.0)))
    if architecture.window:
        file.writer.add_rope_freq_base_swa(rotary.get("sliding_attention", whole)["rope_theta"])


def _rotary(config: Any) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its rotary parameters; models with one kind have the whole attention alone."""
    said = getattr(config, "rope_parameters", None) or {}
    return said if "full_attention" in said else {"full_attention": said}


def text_tensors(llm: Any) -> Tensors:
    """Every tensor of the LLM under llama.cpp's name, as llama.cpp computes with it."""
    gguf, config = gguf_package(), llm.config
    architecture = architecture_of(llm)
    assert architecture is not None, "text_obstacles() lets nothing else through"
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    found: Tensors = {}
    for ours, tensor in llm.state_dict().items():
        if ours == "lm_head.weight" and tied and architecture.head != _OWN:
            continue
        if ours == "lm_head.bias" and architecture.name != "phi2":
            continue
        for name, part in _split(ours, tensor):
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, f"{name} has no name in llama.cpp's {architecture.name}"
            found[theirs] = _fitted(theirs, part, config, architecture)
    if architecture.permuted and _rotary(config)["full_attention"].get("rope_type", "default") != "default":
        found["rope_freqs.weight"] = _frequency_factors(llm)
    return found


def _split(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """OpenELM keeps gate and value of a feed-forward layer in one matrix, llama.cpp in two."""
    if not name.endswith(".ffn.proj_1.weight"):
        return [(name, tensor)]
    gate, up = tensor.chunk(2)
    block = name.split(".")[2]
    # the names of Llama, which every map of names knows
    return [(f"model.layers.{block}.mlp.gate_proj.weight", gate), (f"model.layers.{block}.mlp.up_proj.weight", up)]


def _fitted(name: str, tensor: torch.Tensor, config: Any, architecture: Architecture) -> torch.Tensor:
    if architecture.permuted and (found := re.search(r"\.attn_([qk])\.", name)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor + 1 if architecture.shifted and name.endswith("norm.weight") else tensor


def _frequency_factors(llm: Any) -> torch.Tensor:
    """What llama.cpp divides the plain rotary frequencies by, one of each pair of dimensions."""
    frequencies = llm.model.rotary_emb.inv_freq.float()
    theta = _rotary(llm.config)["full_attention"]["rope_theta"]
    plain = theta ** -(torch.arange(len(frequencies)).float() / len(frequencies))
    return plain / frequencies
