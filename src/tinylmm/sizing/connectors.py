"""The shipped connectors as layers, from their options; a unit is one image, or one tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from tinylmm.sizing.layers import (
    Attention,
    Depthwise,
    Elementwise,
    Layer,
    Linear,
    Norm,
    Part,
    UnknownShapeError,
    Weights,
    mlp,
)

PACKAGE = "tinylmm.models."
_OF_CLIPS = ("NaiveResamplerConnector", "GroupResamplerConnector")


def takes_clips(target: str) -> bool:
    """Whether a connector takes the tokens of all frames of a clip together (`Connector.takes_clips`)."""
    return target.startswith(PACKAGE) and target.rpartition(".")[2] in _OF_CLIPS


def connector_part(
    target: str, options: Mapping[str, Any], vision_dim: int, tower_tokens: int, llm_dim: int, tiled: bool
) -> Part:
    """Return a connector as layers.

    Args:
        target, options: `connector._target_` and `connector.options`.
        vision_dim, tower_tokens: of the tower's output for an image.
        llm_dim: of the LLM's input.
        tiled: whether images come in tiles, with a learned newline.

    Raises:
        UnknownShapeError: the class is not one of ours, or cannot take these tokens.
    """
    name = target.rpartition(".")[2]
    if not target.startswith(PACKAGE) or name not in _CONNECTORS:
        raise UnknownShapeError(f"{target} is a class whose size is not known here")
    stem, blocks, tail, tokens = _CONNECTORS[name](vision_dim, llm_dim, tower_tokens, dict(options))
    newline = (Weights("image_newline", llm_dim),) if tiled else ()
    return Part((*stem, *newline), tuple(blocks), tuple(tail), depth=len(blocks), width=llm_dim, tokens=tokens)


_Layers = tuple[list[Layer], list[tuple[Layer, ...]], list[Layer], int]
"""Stem, blocks, tail, and tokens an image."""


def _identity(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return [], [], [], tokens


def _linear(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return [], [(Linear("linear", vision, llm, rows=tokens, source=True),)], [], tokens


def _mlp(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return [], _mlp_blocks(vision, llm, tokens, options), [], tokens


def _mlp_blocks(inputs: int, outputs: int, rows: int, options: dict[str, Any]) -> list[tuple[Layer, ...]]:
    return mlp(inputs, outputs, int(options.get("depth", 2)), rows, str(options.get("activation", "gelu")))


def _mof(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    one = _mlp_blocks(vision, llm, tokens // 2, options)
    return [], [block + block for block in one], [], tokens


def _pixel_shuffle(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    factor = int(options.get("factor", 2))
    width, left = vision * factor**2, tokens // factor**2
    norm: list[Layer] = [Norm(width, rows=left, bias=True, fused=True)] if options.get("norm", True) else []
    return norm, mlp(width, llm, int(options.get("depth", 2)), left, "gelu", source=not norm), [], left


def _pooled(tokens: int, options: dict[str, Any]) -> int:
    side = _side(tokens)
    pooled = options.get("side") or -(-side // int(options.get("factor", 2)))
    return int(pooled) ** 2


def _side(tokens: int) -> int:
    side = isqrt(tokens)
    if side * side != tokens:
        raise UnknownShapeError(f"the tower gives {tokens} tokens an image, which are no square grid")
    return side


def _average_pool(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    left = _pooled(tokens, options)
    return [], _mlp_blocks(vision, llm, left, options), [], left


def _ldp(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    left = (-(-_side(tokens) // 2)) ** 2
    stem = [layer for block in mlp(vision, llm, 2, tokens, "gelu") for layer in block]
    return stem, [_separable(llm, tokens), _separable(llm, left)], [], left


def _separable(width: int, rows: int) -> tuple[Layer, ...]:
    squeezed = max(8, int(width / 4 + 4) // 8 * 8)
    squeezed += 8 if squeezed < 0.9 * width / 4 else 0
    norm = Norm(width, rows=rows, bias=True, fused=True)
    return (
        Depthwise(width, 9, rows, bias=False),
        norm,
        Elementwise("hardswish", width, rows),
        Linear("squeeze", width, squeezed, adapts=False),
        Linear("excite", squeezed, width, adapts=False),
        Elementwise("product", width, rows),
        Linear("pointwise", width, width, bias=False, rows=rows, adapts=False),
        norm,
    )


def _ldp_v2(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    left = _pooled(tokens, options)
    return [], mlp(vision, llm, 2, tokens, "gelu"), [Depthwise(llm, 9, left, bias=True)], left


def _qformer(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    width, depth = int(options.get("hidden_size", 768)), int(options.get("layers", 12))
    heads, asked = int(options.get("heads", 12)), int(options.get("num_queries", 128))
    every, dropout = int(options.get("cross_attention_every", 2)), float(options.get("dropout", 0.1)) > 0
    norm = Norm(width, rows=asked, bias=True, fused=True)
    drop: tuple[Layer, ...] = (Elementwise("dropout", width, asked),) if dropout else ()
    blocks: list[tuple[Layer, ...]] = []
    for number in range(depth):
        layers = [*_bert_attention(width, heads, asked, asked, None), *drop, norm]
        if number % every == 0:
            layers += [*_bert_attention(width, heads, asked, tokens, vision), *drop, norm]
        inner = Linear("dense", width, 4 * width, rows=asked)
        outer = Linear("dense", 4 * width, width, rows=asked)
        blocks.append((*layers, inner, Elementwise("gelu", 4 * width, asked), outer, *drop, norm))
    stem: list[Layer] = [Weights("query_tokens", asked * width), norm, *drop]
    return stem, blocks, [Linear("projector", width, llm, rows=asked)], asked


def _bert_attention(width: int, heads: int, asked: int, keys: int, image: int | None) -> tuple[Layer, ...]:
    """Self-attention of the queries, or of the queries on the tower's features where `image` is their width."""
    inputs, across = image or width, image is not None
    return (
        Linear("query", width, width, rows=asked),
        Linear("key", inputs, width, rows=keys, source=across, shared=not across),
        Linear("value", inputs, width, rows=keys, source=across, shared=True),
        Attention(heads, width // heads, heads, queries=asked, keys=keys),
        Linear("dense", width, width, rows=asked),
    )


def _perceiver(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return _resampler(vision, llm, tokens, {"num_queries": 128} | options, groups=1)


def _naive_resampler(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return _resampler(vision, llm, tokens, {"num_queries": 512} | options, groups=1)


def _group_resampler(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    return _resampler(vision, llm, tokens, {"num_queries": 512} | options, groups=int(options.get("groups", 16)))


def _resampler(vision: int, llm: int, tokens: int, options: dict[str, Any], groups: int) -> _Layers:
    """`groups`: of consecutive tokens, each asked by the same latents; each query meets its own group's keys alone."""
    asked, depth = int(options["num_queries"]), int(options.get("depth", 3))
    heads, dim = int(options.get("heads", 8)), int(options.get("head_dim", 64))
    keys = tokens + asked
    block: tuple[Layer, ...] = (
        Norm(llm, rows=tokens, bias=True, fused=True),
        Norm(llm, rows=asked, bias=True, fused=True),
        Linear("to_q", llm, heads * dim, bias=False, rows=asked),
        Linear("to_kv", llm, 2 * heads * dim, bias=False, rows=keys),
        Attention(heads, dim, heads, queries=asked, keys=keys // groups),
        Linear("to_out", heads * dim, llm, bias=False, rows=asked),
        *_resampler_ffn(llm, asked),
    )
    stem: list[Layer] = [
        Weights("latents", asked // groups * llm),
        Linear("linear", vision, llm, rows=tokens, source=True),
    ]
    return stem, [block] * depth, [Norm(llm, rows=asked, bias=True, fused=True)], asked


def _bench_resampler(vision: int, llm: int, tokens: int, options: dict[str, Any]) -> _Layers:
    asked, depth = int(options.get("num_queries", 128)), int(options.get("depth", 3))
    width, heads = int(options.get("hidden_size", 768)), int(options.get("heads", 12))
    block: tuple[Layer, ...] = (
        Norm(vision, rows=tokens, bias=True, fused=True),
        Norm(width, rows=asked, bias=True, fused=True),
        Linear("to_q", width, width, bias=False, rows=asked),
        Linear("to_k", vision, width, bias=False, rows=tokens),
        Linear("to_v", vision, width, bias=False, rows=tokens, shared=True),
        Attention(heads, width // heads, heads, queries=asked, keys=tokens),
        Linear("to_out", width, width, bias=False, rows=asked),
        *_resampler_ffn(width, asked),
    )
    tail: list[Layer] = [Norm(width, rows=asked, bias=True, fused=True)]
    return [Weights("queries", asked * width)], [block] * depth, [*tail, _last(width, llm, asked)], asked


def _last(width: int, llm: int, asked: int) -> Linear:
    return Linear("final_proj", width, llm, bias=False, rows=asked)


def _resampler_ffn(width: int, rows: int) -> tuple[Layer, ...]:
    return (
        Norm(width, rows=rows, bias=True, fused=True),
        Linear("1", width, 4 * width, bias=False, rows=rows),
        Elementwise("gelu", 4 * width, rows),
        Linear("3", 4 * width, width, bias=False, rows=rows),
    )


_CONNECTORS: dict[str, Callable[[int, int, int, dict[str, Any]], _Layers]] = {
    "IdentityConnector": _identity,
    "LinearConnector": _linear,
    "MLPConnector": _mlp,
    "MoFMLPConnector": _mof,
    "PixelShuffleMLPConnector": _pixel_shuffle,
    "AveragePoolMLPConnector": _average_pool,
    "LDPConnector": _ldp,
    "LDPv2Connector": _ldp_v2,
    "QFormerConnector": _qformer,
    "PerceiverConnector": _perceiver,
    "BenchResamplerConnector": _bench_resampler,
    "NaiveResamplerConnector": _naive_resampler,
    "GroupResamplerConnector": _group_resampler,
}
