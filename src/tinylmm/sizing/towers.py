"""Vision towers as layers: from the fields of an encoder's config.json and how its output is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinylmm.sizing.layers import Attention, Elementwise, Layer, Linear, Norm, Part, UnknownShapeError, Weights

MOF = "tinylmm.models.mof.MoFTower"
TOWER = "tinylmm.models.vision.HFVisionTower"
MODEL_TYPES = {
    "CLIPVisionModel": "clip",
    "SiglipVisionModel": "siglip",
    "Dinov2Model": "dinov2",
    "Dinov2WithRegistersModel": "dinov2_with_registers",
    "DINOv3ViTModel": "dinov3_vit",
    "ViTModel": "vit",
}
"""Class of `vision_tower.encoder` -> kind; in a config.json, the kind may have `_vision_model` behind it."""


@dataclass(frozen=True)
class TowerOutputShape:
    """How a tower's output is read: which hidden state, and which tokens of it (`config/spec.py` has the meanings)."""

    image_size: int
    select_layer: int
    select: str
    drop_first_token: bool


def tower_part(target: str, encoder: str, config: Mapping[str, Any], output: TowerOutputShape) -> Part:
    """Return a tower as layers; a unit is one image, or one tile.

    Args:
        target, encoder: `vision_tower._target_` and `vision_tower.encoder`.
        config: fields of the encoder's config.json, or of the spec's `architecture`.

    Raises:
        UnknownShapeError: the class is not known here, or the config lacks a number.
    """
    if target not in (TOWER, MOF):
        raise UnknownShapeError(f"{target} is a class whose size is not known here")
    try:
        if target == MOF:
            clip, dinov2 = (_encoder(kind, config[kind], output) for kind in ("clip", "dinov2"))
            return _mixture(clip, dinov2)
        fields = config.get("vision_config") or config
        kind = MODEL_TYPES.get(encoder.rpartition(".")[2]) or str(fields.get("model_type"))
        return _encoder(kind.removesuffix("_vision_model"), fields, output)
    except KeyError as error:
        raise UnknownShapeError(f"its config says nothing of {error.args[0]}") from error


def _mixture(clip: Part, dinov2: Part) -> Part:
    """Two encoders side by side: block i of one with block i of the other; their tokens are interleaved."""
    pairs = tuple(one + other for one, other in zip(clip.blocks, dinov2.blocks, strict=True))
    unreached = clip.unreached + dinov2.unreached
    both = replace(clip, stem=clip.stem + dinov2.stem, blocks=pairs, unreached=unreached)
    return replace(both, tokens=clip.tokens + dinov2.tokens)


def _encoder(kind: str, config: Mapping[str, Any], output: TowerOutputShape) -> Part:
    if kind not in MODEL_TYPES.values():
        raise UnknownShapeError(f"encoders of type '{kind}' are not among those whose size is known here")
    depth = int(config["num_hidden_layers"])
    run = output.select_layer if output.select_layer >= 0 else depth + 1 + output.select_layer
    if not 0 <= run <= depth:
        raise UnknownShapeError(f"select_layer {output.select_layer} lies outside its {depth} blocks")
    width, patch = int(config["hidden_size"]), int(config["patch_size"])
    patches = (output.image_size // patch) ** 2
    prefix = 0 if kind == "siglip" else 1 + int(config.get("num_register_tokens", _REGISTERS.get(kind, 0)))
    stem = _stem(kind, config, width, patch, patches, patches + prefix)
    block = _block(kind, config, width, patches + prefix)
    dropped = (prefix if output.select == "patch" else 0) + int(output.drop_first_token)
    tokens = patches + prefix - dropped
    tail = _unreached(kind, config, width)
    pixels = int(config.get("num_channels", 3)) * output.image_size**2
    return Part(stem, (block,) * run, (), tail, depth=depth, width=width, tokens=tokens, pixels=pixels)


_REGISTERS = {"dinov2_with_registers": 4, "dinov3_vit": 0}
"""Register tokens where the config names none: defaults of transformers' config classes."""


def _stem(kind: str, config: Mapping[str, Any], width: int, patch: int, patches: int, rows: int) -> tuple[Layer, ...]:
    channels = int(config.get("num_channels", 3))
    inputs = channels * patch * patch
    held = (int(config["image_size"]) // patch) ** 2
    embedding = Linear("patch", inputs, width, bias=kind != "clip", rows=patches, source=True, adapts=False)
    if kind == "siglip":
        return (embedding, Weights("positions", held * width))
    if kind == "clip":
        tokens = (Weights("class", width), Weights("positions", (held + 1) * width))
        return (embedding, *tokens, Norm(width, rows=rows, bias=True, fused=True))
    layers: list[Layer] = [embedding, Weights("class", width)]
    if kind in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        layers.append(Weights("mask", width, reached=False))
        layers.append(Weights("registers", int(config.get("num_register_tokens", _REGISTERS.get(kind, 0))) * width))
    if kind != "dinov3_vit":
        layers.append(Weights("positions", (held + 1) * width))
    return tuple(layers)


def _block(kind: str, config: Mapping[str, Any], width: int, rows: int) -> tuple[Layer, ...]:
    heads = int(config["num_attention_heads"])
    norm = Norm(width, rows=rows, bias=True, fused=True)
    if kind == "dinov3_vit":
        biases = [bool(config.get(f"{name}_bias", given)) for name, given in _DINOV3_BIASES.items()]
    else:
        biases = [bool(config.get("qkv_bias", True))] * 3 + [True]
    turned = kind == "dinov3_vit"
    attention = (
        Linear("q_proj", width, width, biases[0], rows),
        Linear("k_proj", width, width, biases[1], rows, shared=True),
        Linear("v_proj", width, width, biases[2], rows, shared=True),
        Attention(heads, width // heads, heads, queries=rows, keys=rows, turned=turned),
        Linear("o_proj" if kind.startswith(("dino", "vit")) else "out_proj", width, width, biases[3], rows),
    )
    scale: tuple[Layer, ...] = ()
    if kind.startswith("dino"):
        scale = (Elementwise("scale", width, rows, parameters=width),)
    return (norm, *attention, *scale, norm, *_feed_forward(kind, config, width, rows), *scale)


_DINOV3_BIASES = {"query": True, "key": False, "value": True, "proj": True}


def _feed_forward(kind: str, config: Mapping[str, Any], width: int, rows: int) -> tuple[Layer, ...]:
    activation = str(config.get("hidden_act", {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(kind, "gelu")))
    if kind.startswith("dinov2"):
        inner = int(width * config.get("mlp_ratio", 4))
        if config.get("use_swiglu_ffn"):
            inner = (int(inner * 2 / 3) + 7) // 8 * 8
            gate = (Elementwise("silu", inner, rows), Elementwise("product", inner, rows))
            outer = Linear("weights_out", inner, width, rows=rows)
            return (Linear("weights_in", width, 2 * inner, rows=rows), *gate, outer)
        names = ("fc1", "fc2")
    else:
        inner = int(config["intermediate_size"])
        names = ("fc1", "fc2") if kind != "dinov3_vit" else ("up_proj", "down_proj")
    bias = bool(config.get("mlp_bias", True)) if kind == "dinov3_vit" else True
    outer = Linear(names[1], inner, width, bias, rows)
    if kind == "dinov3_vit" and config.get("use_gated_mlp"):
        gates = (
            Linear("gate_proj", width, inner, bias, rows),
            Linear("up_proj", width, inner, bias, rows, shared=True),
        )
        return (*gates, Elementwise(activation, inner, rows), Elementwise("product", inner, rows), outer)
    return (Linear(names[0], width, inner, bias, rows), Elementwise(activation, inner, rows), outer)


def _unreached(kind: str, config: Mapping[str, Any], width: int) -> tuple[Layer, ...]:
    """What an encoder holds behind its blocks, which a tower never runs: last norm, pooling head."""
    last = Norm(width, bias=True, fused=True)
    if kind == "siglip" and config.get("vision_use_head", True):
        inner = int(config["intermediate_size"])
        inside = Weights("attention", 4 * width * width + 4 * width), Weights("probe", width)
        return (last, *inside, last, Linear("fc1", width, inner), Linear("fc2", inner, width))
    return (last, Linear("pooler", width, width)) if kind == "vit" else (last,)
