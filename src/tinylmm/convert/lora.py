"""LoRA adapters of peft, merged into plain weights: W + scale * B A (arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylmm.convert.source import ADAPTER_CONFIG, Source, read_json
from tinylmm.convert.tensors import Tensors, listed, read_file
from tinylmm.errors import DataError, UserError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."
_WRAPPERS = (".modules_to_save.default", ".base_layer")
"""Modules that peft puts between a name and its weight."""
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")


def read_adapter(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read a peft folder: its config, and its tensors without peft's `base_model.model.` in front. See `merge_lora`.

    Raises:
        DataError: a file is missing or damaged.
        UserError: it is no plain LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: only plain LoRA can be merged (peft_type is {config.get('peft_type')}, "
            f"use_dora {config.get('use_dora', False)}, fan_in_fan_out {config.get('fan_in_fan_out', False)}). "
            "Merge it with peft first."
        )
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return config, {key.removeprefix(PEFT_PREFIX): value for key, value in read_file(folder / name).items()}
    raise DataError(f"{folder} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_FILES)}.")


def plain_name(name: str) -> str:
    """Return the name that a tensor of a model wrapped by peft has in the plain model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix(PEFT_PREFIX)


def merge_run(source: Source, base: Tensors, config: dict[str, Any], adapter: Tensors) -> Tensors:
    """Merge the adapter that `read_adapter` found in a checkpoint, and note it. See `merge_lora`."""
    source.notes.append(
        f"the LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']}) is merged into the weights"
    )
    return merge_lora(base, config, adapter, str(source.folder))


def merge_lora(base: Tensors, config: dict[str, Any], adapter: Tensors, source: str) -> Tensors:
    """Return `base` with every pair of adapter matrices added to its weight, each adapter tensor used exactly once.

    Args:
        base: plain tensors; the adapter's module names are theirs without `.weight`.
        config: adapter_config.json.
        adapter: tensors named `<module>.lora_A.weight` and so on; others (biases, `modules_to_save`) replace the base's.
        source: what to call the adapter in errors.

    Raises:
        UserError: an adapter tensor has no partner or no weight to go to, or shapes do not fit.
    """
    merged = dict(base)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        found = _LORA.fullmatch(name)
        if found:
            side = found["side"] + ("e" if found["kind"] else "")
            pairs.setdefault(found["module"], {})[side] = tensor
            continue
        target = plain_name(name)
        if target not in merged or merged[target].shape != tensor.shape:
            raise UserError(f"{source}: the adapter's tensor {name} has no tensor of its shape in the base model.")
        merged[target] = tensor
    wrong = [
        module
        for module in pairs
        if f"{module}.weight" not in merged or set(pairs[module]) not in ({"A", "B"}, {"Ae", "Be"})
    ]
    if wrong:
        raise UserError(
            f"{source}: adapter matrices without a weight of the base model, or without their partner: "
            f"{listed(sorted(wrong))}. Is the base model the one it was trained on?"
        )
    for module, pair in pairs.items():
        merged[f"{module}.weight"] = _merged(
            merged[f"{module}.weight"], pair, _scale(config, module), f"{source}: {module}"
        )
    return merged


def _merged(weight: Tensor, pair: dict[str, Tensor], scale: float, where: str) -> Tensor:
    """Sum in fp32 (peft does so too), then go back to the weight's dtype."""
    # Of a linear layer B A is (out, in) as the weight; of an embedding it is (D, V), the weight (V, D).
    delta = pair["B"].float() @ pair["A"].float() if "A" in pair else (pair["Be"].float() @ pair["Ae"].float()).T
    if delta.shape != weight.shape:
        raise UserError(
            f"{where}: the adapter's matrices give {tuple(delta.shape)}, the weight has {tuple(weight.shape)}."
        )
    return (weight.to(torch.float32) + scale * delta).to(weight.dtype)


def _scale(config: dict[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; patterns give single modules their own."""
    rank = _patterned(config.get("rank_pattern"), module, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _patterned(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
            return float(value)
    return default
