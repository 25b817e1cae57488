"""The causal LMs that conf/llm names, and others of their families, as layers: from the fields of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinylmm.sizing.layers import Attention, Elementwise, Layer, Linear, Norm, Part, UnknownShapeError, Weights
from tinylmm.sizing.openelm import ffn_widths, query_heads


@dataclass(frozen=True)
class _Family:
    """What the classes of one `model_type` have and their config.json does not say.

    Attributes:
        bias: (queries, keys and values; output; feed-forward), where no key of `bias_keys` says it.
        bias_keys: keys of the config that say it.
        outer: norms behind attention and feed-forward too (Gemma 2 and 3).
        head_norms: norms of each head's queries and keys: always, or where `qk_layernorm` is set.
        parallel: attention and feed-forward read one norm.
    """

    rms: bool = True
    bias: tuple[bool, bool, bool] = (False, False, False)
    bias_keys: tuple[str | None, str | None, str | None] = (None, None, None)
    gated: bool = True
    outer: bool = False
    head_norms: bool = False
    parallel: bool = False
    head_bias: bool = False
    head_dim: int | None = None
    key_heads: int | None = None
    tied: bool = False
    activation: str = "silu"
    full_every: int | None = None


FAMILIES = {
    "llama": _Family(bias_keys=("attention_bias", "attention_bias", "mlp_bias")),
    "mistral": _Family(key_heads=8),
    "phi": _Family(
        rms=False, bias=(True, True, True), gated=False, parallel=True, head_bias=True, activation="gelu_new"
    ),
    "stablelm": _Family(rms=False, bias_keys=("use_qkv_bias", None, None), key_heads=32),
    "qwen2": _Family(bias=(True, False, False), key_heads=32),
    "qwen3": _Family(bias_keys=("attention_bias", "attention_bias", None), head_norms=True, head_dim=128, key_heads=32),
    "gemma": _Family(
        bias_keys=("attention_bias", "attention_bias", None),
        head_dim=256,
        key_heads=16,
        tied=True,
        activation="gelu_pytorch_tanh",
    ),
    "gemma2": _Family(
        bias_keys=("attention_bias", "attention_bias", None),
        outer=True,
        head_dim=256,
        key_heads=4,
        tied=True,
        activation="gelu_pytorch_tanh",
        full_every=2,
    ),
    "gemma3_text": _Family(
        bias_keys=("attention_bias", "attention_bias", None),
        outer=True,
        head_norms=True,
        head_dim=256,
        key_heads=4,
        tied=True,
        activation="gelu_pytorch_tanh",
        full_every=6,
    ),
}
"""`model_type` of a config.json -> its family; OpenELM has its own rules."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "PhiForCausalLM": "phi",
    "StableLmForCausalLM": "stablelm",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "OpenELMForCausalLM": "openelm",
}
"""Class of `llm._target_` -> model_type."""


def llm_part(target: str, config: Mapping[str, Any]) -> Part:
    """Return a causal LM as layers; a unit is a token.

    Args:
        target: `llm._target_`; a class that is none of MODEL_TYPES is told by the config's own model_type.
        config: fields of its config.json, or of the spec's `architecture`.

    Raises:
        UnknownShapeError: the family is not known here, or the config lacks a number.
    """
    kind = MODEL_TYPES.get(target.rpartition(".")[2], config.get("model_type"))
    try:
        if kind == "openelm":
            return _openelm(config)
        if kind not in FAMILIES:
            raise UnknownShapeError(f"models of type '{kind}' are not among those whose size is known here")
        return _decoder(FAMILIES[str(kind)], config)
    except KeyError as error:
        raise UnknownShapeError(f"its config says nothing of {error.args[0]}") from error


def _decoder(family: _Family, config: Mapping[str, Any]) -> Part:
    width, depth, vocab = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    norm = Norm(width, bias=not family.rms, fused=not family.rms)
    blocks = tuple(_block(family, config, norm, _window(family, config, number)) for number in range(depth))
    tied = bool(config.get("tie_word_embeddings", family.tied))
    head = Linear("lm_head", width, vocab, bias=family.head_bias)
    stem = (Weights("embed_tokens", vocab * width),)
    return Part(stem, blocks, (norm,), depth=depth, width=width, head=head, tied=tied)


def _block(family: _Family, config: Mapping[str, Any], norm: Norm, window: int | None) -> tuple[Layer, ...]:
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or family.head_dim or width // heads)
    key_heads = int(config.get("num_key_value_heads") or family.key_heads or heads)
    in_bias, out_bias, ffn_bias = (
        bool(config.get(key, given)) if key else given for key, given in zip(family.bias_keys, family.bias, strict=True)
    )
    parallel = family.parallel or bool(config.get("use_parallel_residual", False))
    head_norms: tuple[Layer, ...] = ()
    if family.head_norms:
        head_norms = (Norm(dim, rows=heads), Norm(dim, rows=key_heads))
    elif config.get("qk_layernorm"):
        head_norms = _learned_head_norms(family, dim, heads, key_heads)
    capped = config.get("attn_logit_softcapping") is not None
    attention = (
        Linear("q_proj", width, heads * dim, in_bias),
        Linear("k_proj", width, key_heads * dim, in_bias, shared=True),
        Linear("v_proj", width, key_heads * dim, in_bias, shared=True),
        *head_norms,
        Attention(heads, dim, key_heads, window=window, capped=capped, turned=True),
        Linear("dense" if family.parallel else "o_proj", heads * dim, width, out_bias),
    )
    dropout: tuple[Layer, ...] = ()
    if any(float(config.get(key) or 0) > 0 for key in ("resid_pdrop", "hidden_dropout")):
        dropout = (Elementwise("dropout", width),)
    outer = (norm,) if family.outer else ()
    second = () if parallel else (norm,)
    activation = str(config.get("hidden_act") or config.get("hidden_activation") or family.activation)
    ffn = _feed_forward(width, inner, activation, family.gated, ffn_bias, parallel)
    return (norm, *attention, *dropout, *outer, *second, *ffn, *dropout, *outer)


def _learned_head_norms(family: _Family, dim: int, heads: int, key_heads: int) -> tuple[Layer, ...]:
    """`qk_layernorm`: Phi has one norm for all heads, with bias; StableLM one a head, without."""
    if family.parallel:
        return (Norm(dim, rows=heads, bias=True, fused=True), Norm(dim, rows=key_heads, bias=True, fused=True))
    return tuple(Norm(dim, fused=True) for _ in range(heads + key_heads))


def _feed_forward(
    width: int, inner: int, activation: str, gated: bool, bias: bool, parallel: bool
) -> tuple[Layer, ...]:
    if not gated:
        return (
            Linear("fc1", width, inner, bias, shared=parallel),
            Elementwise(activation, inner),
            Linear("fc2", inner, width, bias),
        )
    return (
        Linear("gate_proj", width, inner, bias, shared=parallel),
        Linear("up_proj", width, inner, bias, shared=True),
        Elementwise(activation, inner),
        Elementwise("product", inner),
        Linear("down_proj", inner, width, bias),
    )


def _window(family: _Family, config: Mapping[str, Any], number: int) -> int | None:
    """How far back block `number` sees: Gemma's blocks see locally but for every second, or every sixth."""
    kinds = config.get("layer_types")
    local = (
        kinds[number] == "sliding_attention"
        if isinstance(kinds, list | tuple)
        else family.full_every is not None and (number + 1) % family.full_every != 0
    )
    return int(config.get("sliding_window") or 4096) if local else None


def _openelm(config: Mapping[str, Any]) -> Part:
    width, depth = int(config["model_dim"]), int(config["num_transformer_layers"])
    dim, group = int(config["head_dim"]), int(config["num_gqa_groups"])
    heads, inner = query_heads(config), ffn_widths(config)
    gated, norm = bool(config.get("ffn_with_glu", True)), Norm(width)
    activation = {"swish": "silu"}.get(name := str(config.get("activation_fn_name", "swish")), name)
    blocks: list[tuple[Layer, ...]] = []
    for queries, ffn in zip(heads, inner, strict=True):
        keys = queries // group
        normed = (Norm(dim, rows=queries), Norm(dim, rows=keys)) if config.get("normalize_qk_projections") else ()
        blocks.append(
            (
                norm,
                Linear("qkv_proj", width, (queries + 2 * keys) * dim, bias=False),
                *normed,
                Attention(queries, dim, keys, turned=True),
                Linear("out_proj", queries * dim, width, bias=False),
                norm,
                Linear("proj_1", width, 2 * ffn if gated else ffn, bias=False),
                Elementwise(activation, ffn),
                *((Elementwise("product", ffn),) if gated else ()),
                Linear("proj_2", ffn, width, bias=False),
            )
        )
    vocab = int(config["vocab_size"])
    head, tied = Linear("lm_head", width, vocab, bias=False), bool(config.get("share_input_output_layers", False))
    stem = (Weights("token_embeddings", vocab * width),)
    return Part(stem, tuple(blocks), (norm,), depth=depth, width=width, head=head, tied=tied)
