"""A peft folder for transformers and vLLM: one LoRA for the whole model, and beside it, in `base/`, what it sits on.

The base is what the adapters were trained on, with every part that the same stage trained as a whole: the LLM's own weights
(those that 4- or 8-bit ones stood for, where it was trained on such) and the stage's connector.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tinylmm.convert.ask_elsewhere import ask_peft, transformers_tolerance
from tinylmm.convert.asking import Program
from tinylmm.convert.format import Export, Format, Written
from tinylmm.convert.formats import hf
from tinylmm.convert.hf_folder import LAYERS, LLM, MODEL, PROJECTOR, TOWER, write_folder
from tinylmm.convert.outlets import ADAPTER
from tinylmm.convert.source import ADAPTER_CONFIG, read_json, write_json
from tinylmm.models.adapters import PREFIX, WEIGHTS_FILE
from tinylmm.models.checkpoint import ADAPTERS, LoadedModel, merge_adapters

BASE = "base"
_SHARED = ("bias", "use_rslora", "peft_type")
"""What one adapter has once, however many parts it is on."""
_SECOND = f"{PROJECTOR}{LAYERS['2.']}"
NO_ADAPTER = (
    "no part of it was trained through an adapter (recipes lora and qlora do that), or it was merged by an import: "
    "--to hf writes it whole."
)


def write(export: Export, folder: Path) -> Written:
    """Write base and adapter; the loaded model has its adapters merged afterwards."""
    loaded = export.loaded
    (folder / BASE).mkdir()
    base = write_folder(export, folder / BASE)
    configs = {part: _config_of(loaded, part) for part in loaded.adapters}
    tensors: dict[str, torch.Tensor] = {}
    for part in loaded.adapters:
        saved = load_file(_folder_of(loaded, part) / WEIGHTS_FILE)
        named = {
            PREFIX + module_name(loaded, part, name.removeprefix(PREFIX)): tensor for name, tensor in saved.items()
        }
        tensors |= {name: _scaled(name, tensor, loaded.model.image_scale) for name, tensor in named.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _whole_config(loaded, configs))
    _note(export, configs)
    merge_adapters(loaded)
    return Written(base.tensors + len(tensors), base.difference)


def obstacles(export: Export) -> list[str]:
    """Return every reason why there is no such folder of the model."""
    loaded = export.loaded
    if not loaded.adapters:
        return [NO_ADAPTER]
    configs = [_config_of(loaded, part) for part in loaded.adapters]
    differing = [key for key in _SHARED if len({json.dumps(config.get(key)) for config in configs}) > 1]
    reasons = [f"its parts have adapters of several kinds, and one has a single {key}" for key in differing]
    return [*reasons, *hf.obstacles(export)]


def module_name(loaded: LoadedModel, part: str, name: str) -> str:
    """What transformers' class calls a module of a part's adapter, whose own name is relative to its part."""
    if part == "llm":
        return MODEL + LLM + name.removeprefix(f"{loaded.model.llm.base_model_prefix}.")
    if part == "vision_tower":
        return MODEL + TOWER + name
    inner = name.removeprefix("layers.")
    layer = next(layer for layer in LAYERS if f"{inner}.".startswith(layer))
    return f"{MODEL}{PROJECTOR}{LAYERS[layer]}{inner.removeprefix(layer[:-1]).removeprefix('.')}".rstrip(".")


def _scaled(name: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """What multiplies the connector's output lies in its last layer, and so in what is added to that."""
    added = _SECOND in name and ".lora_A." not in name
    return tensor.to(torch.float32).contiguous() * (scale if added else 1.0)


def _folder_of(loaded: LoadedModel, part: str) -> Path:
    assert loaded.folder is not None, "adapters lie in a folder"
    return loaded.folder / ADAPTERS / part


def _config_of(loaded: LoadedModel, part: str) -> dict[str, Any]:
    return read_json(_folder_of(loaded, part) / ADAPTER_CONFIG)


def _whole_config(loaded: LoadedModel, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One adapter_config.json: the first part's, with ranks and scales of the others' modules where they differ."""
    first = next(iter(configs.values()))
    modules = {
        part: sorted(module_name(loaded, part, name) for name in config["target_modules"])
        for part, config in configs.items()
    }
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for part, config in configs.items():
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            if config[key] != first[key]:
                patterns[pattern] |= {re.escape(name): config[key] for name in modules[part]}
    return first | {
        **patterns,
        "target_modules": sorted(name for names in modules.values() for name in names),
        "base_model_name_or_path": BASE,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def _note(export: Export, configs: dict[str, dict[str, Any]]) -> None:
    loaded = export.loaded
    held = {part: entry.quantization for part, entry in loaded.adapters.items() if entry.quantization is not None}
    for part, quantization in held.items():
        export.notes.append(
            f"the {part}'s adapter was trained on {quantization.bits}-bit weights: base/ has the values that these stood for"
        )
    if len({(config["r"], config["lora_alpha"]) for config in configs.values()}) > 1:
        export.notes.append("its parts have adapters of several ranks or scales, which peft reads and vLLM does not")
    if any(config.get("bias", "none") != "none" for config in configs.values()):
        export.notes.append("it has biases besides its matrices, which peft reads and vLLM does not")
    if "vision_tower" in configs:
        export.notes.append(
            "the tower's adapter has the names of transformers 5, which calls its blocks otherwise than 4"
        )


FORMAT = Format(
    holds="a peft adapter on a LlavaForConditionalGeneration",
    writers={"adapter": write},
    obstacles=obstacles,
    programs={
        "adapter": Program(
            "transformers",
            "transformers and peft, in a fresh process without network, put the adapter on the base beside it",
            lambda: None,
            partial(ask_peft, base=BASE),
            transformers_tolerance,
            ("vLLM was not run.", "Everything ran on the CPU, one question at a time."),
        )
    },
    outlets={"adapter": ADAPTER},
    keeps_adapters=True,
)
