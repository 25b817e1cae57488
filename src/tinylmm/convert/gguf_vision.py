"""A SigLIP tower and an MLP connector as llama.cpp's projector file (mmproj, architecture `clip`, projector `mlp`).

What is said here of llama.cpp is what tools/mtmd does (clip.cpp, models/llava.cpp), read at b10257. Its own conversion scripts
leave out the last block and give every SigLIP another activation, so the file is written by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionModel

from tinylmm.convert.gguf_files import GGUFFile
from tinylmm.convert.gguf_text import architecture_of
from tinylmm.convert.images import mode_of
from tinylmm.convert.tensors import Tensors
from tinylmm.convert.tower import dropped_tokens
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower

PAD_COLOUR = (122, 116, 104)
"""What llama.cpp fills up images with that are not square."""
_TANH = ("gelu_pytorch_tanh", "gelu_new")
_EMBEDDINGS = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
}
_BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_CONNECTOR = {"layers.0": "mm.0", "layers.2": "mm.2"}
_ALWAYS_WIDE = ("v.patch_embd", "v.position_embd")
"""Tensors that are no matrices to multiply with: their types are not all that llama.cpp's convolution and sum take."""


def vision_obstacles(model: LMM) -> list[str]:
    """Return every reason why llama.cpp would see something else than this tower and connector do."""
    return [*_tower_obstacles(model.vision_tower), *_connector_obstacles(model.connector)]


def _tower_obstacles(tower: HFVisionTower) -> list[str]:
    encoder = type(tower.encoder).__name__
    if type(tower) is HFVisionTower and encoder == "CLIPVisionModel":
        return [
            "llama.cpp puts the CLS token of a CLIP tower behind its patches, so that each patch gets its neighbour's position "
            "and the first one is lost (llama.cpp's tracker reports a cosine of 0.505 between such features and the right ones)"
        ]
    if type(tower) is not HFVisionTower or not isinstance(tower.encoder, SiglipVisionModel):
        return [f"its tower is one SigLIP here, and this one is {type(tower).__name__} around {encoder}"]
    reasons = []
    if tower.config.hidden_act not in _TANH:
        reasons.append(
            f"a tower's activation is the tanh GELU in llama.cpp, and this one's is {tower.config.hidden_act}"
        )
    if dropped := dropped_tokens(tower):
        reasons.append(
            f"llama.cpp gives the LLM every patch, and this model was trained without the first {dropped} of "
            f"{tower.num_tokens + dropped} (drop_first_token)"
        )
    if not len(tower.blocks):
        reasons.append("llama.cpp runs at least one block of the tower, and this model reads its embeddings")
    return reasons


def _connector_obstacles(connector: nn.Module) -> list[str]:
    found = type(connector).__name__
    if isinstance(connector, MLPConnector):
        if len(connector.layers) == 3 and isinstance(connector.layers[1], nn.GELU):
            return []
        depth, activation = (len(connector.layers) + 1) // 2, type(connector.layers[1]).__name__
        found += f" of {depth} linear layers with {activation}"
    return [f"its connector is two linear layers with GELU between them (connector=mlp), and this one is {found}"]


def preprocessing_note(image: dict[str, Any]) -> str:
    """What of our image preprocessing llama.cpp does otherwise, whatever a file says."""
    size, mode = image["size"], mode_of(image)
    return (
        f"llama.cpp takes an image of {size} x {size} pixels as it is; any other it pads to a square with the colour "
        f"{PAD_COLOUR} and resizes by a bicubic filter of its own, where this model was trained with mode '{mode}' "
        f"({image['resample']}): prepare images yourself where answers have to be the same"
    )


def write_vision_keys(model: LMM, image: dict[str, Any], file: GGUFFile) -> None:
    """Say of tower and connector what llama.cpp needs to know."""
    config, writer, depth = model.vision_tower.config, file.writer, len(model.vision_tower.blocks)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_projection_dim(model.config.hidden_size)
    writer.add_vision_block_count(depth)
    # Without it llama.cpp runs one block less than the file has.
    writer.add_array("clip.vision.feature_layer", [depth])
    writer.add_vision_image_mean(image["mean"])
    writer.add_vision_image_std(image["std"])


def write_vision_tensors(model: LMM, file: GGUFFile) -> None:
    """Write tower and connector."""
    for name, tensor in vision_tensors(model).items():
        file.add_tensor(name, tensor, "F32" if name.startswith(_ALWAYS_WIDE) else None)


def vision_tensors(model: LMM) -> Tensors:
    """Every tensor that is run, under llama.cpp's name; the norm behind the last block and the pooling head are not."""
    state, names = dict(model.vision_tower.encoder.state_dict()), dict(_EMBEDDINGS)
    for number in range(len(model.vision_tower.blocks)):
        names |= {f"encoder.layers.{number}.{ours}": f"v.blk.{number}.{theirs}" for ours, theirs in _BLOCK.items()}
    found = _renamed(state, names)
    architecture = architecture_of(model.llm)
    scale = model.image_scale
    if architecture is not None and architecture.scales_all:  # what llama.cpp multiplies by is taken out beforehand
        scale /= model.config.hidden_size**0.5
    for name, tensor in _renamed(dict(model.connector.state_dict()), _CONNECTOR).items():
        found[name] = tensor * scale if name.startswith("mm.2.") else tensor
    return found


def _renamed(state: Tensors, names: dict[str, str]) -> dict[str, torch.Tensor]:
    return {
        f"{theirs}.{kind}": state[f"{ours}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in state
    }
