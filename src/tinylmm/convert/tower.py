"""Vision towers of other tools fitted to ours, and how ours are read, in the words of other tools."""

from __future__ import annotations

import copy
import re

from transformers import PreTrainedConfig

from tinylmm.convert.source import Source
from tinylmm.convert.tensors import Ledger, Tensors
from tinylmm.models.vision import HFVisionTower

_WHOLE_CLIP = r"(text_model\..*|visual_projection\..*|text_projection\..*|logit_scale|logit_bias)"


def layer_read(tower: HFVisionTower) -> int:
    """Return the layer that is read as an index into the hidden states, counted from the end: -1 is the last one."""
    return len(tower.blocks) - tower.depth - 1


def dropped_tokens(tower: HFVisionTower) -> int:
    """How many tokens of the layer that is read are dropped, first ones first."""
    return tower.num_prefix + (tower.image_size // int(tower.config.patch_size)) ** 2 - tower.num_tokens


def selection_of(tower: HFVisionTower) -> str:
    """Return `Parts.select` of a tower that drops at most one token: "cut" or "all"."""
    return "cut" if dropped_tokens(tower) else "all"


def fitted_tower(
    config: PreTrainedConfig, found: Tensors, layer: int, source: Source
) -> tuple[PreTrainedConfig, Tensors, int]:
    """Return config, tensors and layer to read, fitted to the blocks that the checkpoint has.

    Args:
        config: the published tower's.
        found: the checkpoint's tensors of it, with or without `vision_model.` in front.
        layer: index into the published tower's hidden states.
        source: gets notes on what is filled in or left out.

    What lies behind the layer that is read never runs, and some checkpoints leave it out: TinyLLaVABench deletes the last
    block. The config then says so (fewer blocks, no pooling head), and a missing last norm is filled with the identity.
    """
    ledger = Ledger(found, str(source.folder))
    ledger.ignore(_WHOLE_CLIP, "the text half of a CLIP or SigLIP model")
    ledger.put(ledger.take("vision_model."))
    ledger.ignore(r"embeddings\.position_ids", "a buffer of 0, 1, 2, ...")
    source.ignored |= ledger.ignored
    tensors = ledger.take("")
    config = copy.deepcopy(config)
    depth = int(config.num_hidden_layers)
    run = layer if layer >= 0 else depth + 1 + layer
    present = {int(block[1]) for name in tensors if (block := re.match(r"encoder\.layers\.(\d+)\.", name))}
    if present == set(range(len(present))) and run <= len(present) < depth:
        config.num_hidden_layers, layer = len(present), run - len(present) - 1
        source.notes.append(
            f"the tower has {len(present)} of {depth} blocks; the missing ones lie behind the layer that is read"
        )
    if getattr(config, "vision_use_head", False) and not any(name.startswith("head.") for name in tensors):
        config.vision_use_head = False
        source.notes.append("the tower has no pooling head, which is never run")
    if "post_layernorm.weight" not in tensors and "embeddings.patch_embedding.weight" in tensors:
        like = tensors["embeddings.patch_embedding.weight"]
        tensors["post_layernorm.weight"] = like.new_ones(config.hidden_size)
        tensors["post_layernorm.bias"] = like.new_zeros(config.hidden_size)
        source.notes.append("the tower has no last norm, which is never run; it is filled with the identity")
    return config, tensors, layer
