"""Save and load a whole LMM as one self-contained folder in Hugging Face conventions. Loading runs no code from it.

    model/
      config.json      what the parts are, how they fit together, template, image preprocessing
      llm/             a transformers folder (config.json, model.safetensors)
      vision_tower/    a transformers folder
      connector/       model.safetensors
      tokenizer/       a transformers tokenizer folder
      adapters/<part>/ a peft folder, for a part that was trained through one; the part's own folder then holds its base

A part that a stage did not change is hard-linked from where it came from: a frozen 2.7B LLM costs no second copy, nor does
the base of an adapter. `load_model` merges adapters into the weights, so whoever uses it meets whole parts only; saving
what it returned writes them merged. config.json lists them, with how their base was quantised in training.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tinylmm.config.description import CONFIG_FILE, AdapterEntry, ModelDescription
from tinylmm.config.fields import PARTS
from tinylmm.config.targets import resolve_target
from tinylmm.errors import IntegrityError
from tinylmm.models.adapters import Adapter, adapter_state, merge_adapter, restore_base, save_adapter
from tinylmm.models.anyres import TiledConnector, with_tiles
from tinylmm.models.attention import loading_attention
from tinylmm.models.build import build_connector
from tinylmm.models.llm import load_llm
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import make_tower

WEIGHTS = "model.safetensors"
ADAPTERS = "adapters"
"""Folder of peft folders; config.json lists them."""


@dataclass
class LoadedModel:
    """A model with what is needed to use it.

    Attributes:
        description: the folder's config.json, without `adapters`.
        folder: where it was loaded from (source of hard links for parts that stay unchanged).
        adapters: part -> its adapter, for parts whose folder there lacks what is merged in memory.
        rebuilt: parts whose tensors are others than those in the folder.
        merged: whether `adapters` are in the weights in memory; else those are their bases, as they were trained on.
    """

    model: LMM
    tokenizer: PreTrainedTokenizerBase
    description: ModelDescription
    folder: Path | None
    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    rebuilt: set[str] = field(default_factory=set)
    merged: bool = True


def save_model(
    loaded: LoadedModel,
    folder: Path,
    state: dict[str, torch.Tensor] | None,
    unchanged: dict[str, Path],
    adapters: dict[str, Adapter] | None = None,
) -> None:
    """Write the model's folder; it must not exist or be left over from a killed try.

    Args:
        state: full state dict gathered over ranks (ZeRO-3), keys as in `LMM.state_dict()`; None reads the model itself.
        unchanged: part -> folder that already holds its files; for a part with an adapter, its base.
        adapters: part -> the adapter it carries in memory.
    """
    adapters = adapters or {}
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    model = loaded.model
    listed: dict[str, AdapterEntry] = {}
    for part, source in unchanged.items():
        link_tree(source, folder / part)
        if part in loaded.adapters and loaded.folder is not None and source == loaded.folder / part:
            link_tree(loaded.folder / ADAPTERS / part, folder / ADAPTERS / part)
            listed[part] = loaded.adapters[part]
    for part, adapter in adapters.items():
        save_adapter(adapter, adapter_state(model, part, state), folder / ADAPTERS / part)
        listed[part] = AdapterEntry(quantization=adapter.quantization)
    for part in PARTS:
        if part not in unchanged:
            save_part(model, part, folder / part, state)
    loaded.tokenizer.save_pretrained(folder / "tokenizer")
    description = loaded.description.with_adapters(listed).as_json()
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def save_part(model: LMM, part: str, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write one part, which carries no adapter, into a new folder; `state` as in `save_model`."""
    if part == "llm":
        _save_hf(cast(PreTrainedModel, model.llm), folder, _part_state(state, "llm"))
    elif part == "vision_tower":
        tower_state = _part_state(state, "vision_tower.encoder")
        whole = model.vision_tower.whole_encoder_state()
        _save_hf(cast(PreTrainedModel, model.vision_tower.encoder), folder, {**whole, **(tower_state or {})})
    else:
        connector = _part_state(state, "connector") or model.connector.state_dict()
        folder.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in connector.items()}, folder / WEIGHTS)


def part_state(model: LMM, part: str) -> dict[str, torch.Tensor]:
    """The tensors that `save_part` writes of a part."""
    if part == "vision_tower":
        return model.vision_tower.whole_encoder_state()
    return dict(cast(nn.Module, getattr(model, part)).state_dict())


def write_merged(source: Path, target: Path, trust: Sequence[str]) -> None:
    """Write the model at `source` to a new folder with its adapters merged into the weights (in fp32)."""
    save_model(load_model(source, trust), target, None, {})


def load_model(
    folder: Path, trust: Sequence[str], attention: str = "auto", llm_weights: bool = True, merge: bool = True
) -> LoadedModel:
    """Load what `save_model` wrote, in fp32 on the CPU, adapters merged.

    Args:
        llm_weights: without them the LLM's parameters are on the meta device, unless adapters are merged into them.
        merge: False leaves adapters out: what is in memory are the bases that they were trained on, and `merge_adapters`
            brings them in.

    Raises:
        IntegrityError: a file is missing, or the tensors of connector or adapter are not those of its class.
        UserError: an adapter was trained on quantised weights, and bitsandbytes is not installed.
    """
    description = ModelDescription.of_folder(folder)
    options: dict[str, Any] = {
        "attn_implementation": loading_attention(attention),
        "dtype": torch.float32,
        "local_files_only": True,
    }
    llm_class = cast(type[PreTrainedModel], resolve_target(description.llm.target, trust, PreTrainedModel, role="llm"))
    whole = llm_weights or "llm" in (description.adapters or {})
    llm = load_llm(llm_class, folder / "llm", None, attention, local_only=True, weights=whole)
    entry, image = description.vision_tower, description.image
    tower_class = resolve_target(entry.target, trust, nn.Module, role="vision_tower")
    encoder_class = cast(type[PreTrainedModel], resolve_target(entry.encoder, trust, PreTrainedModel, role="encoder"))
    encoder = encoder_class.from_pretrained(folder / "vision_tower", **options)
    tower = make_tower(tower_class, encoder, entry.output, image)
    connector = build_connector(description.connector, tower.hidden_size, llm, trust)
    connector = with_tiles(connector, image, tower.num_tokens)
    weights = load_file(folder / "connector" / WEIGHTS)
    if set(weights) != set(connector.state_dict()):
        raise IntegrityError(
            f"{folder / 'connector' / WEIGHTS} holds {sorted(weights)}, the connector needs {sorted(connector.state_dict())}"
        )
    connector.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False, local_files_only=True)
    model = LMM(llm, tower, connector, description.template, description.scale_image_features)
    adapters = description.adapters or {}
    for part, adapter in adapters.items():
        if merge:
            merge_adapter(model, part, folder / ADAPTERS / part, adapter.quantization)
        elif adapter.quantization is not None:
            restore_base(model, part, adapter.quantization)
    return LoadedModel(model, tokenizer, description.without_adapters(), folder, adapters, merged=merge)


def merge_adapters(loaded: LoadedModel) -> None:
    """Bring the adapters into a model that was loaded without them, in place, in fp32."""
    assert loaded.folder is not None and not loaded.merged
    for part in loaded.adapters:
        merge_adapter(loaded.model, part, loaded.folder / ADAPTERS / part, None)
    loaded.merged = True


def set_image_mode(loaded: LoadedModel, mode: str, seed: int) -> None:
    """Let a model see images in another mode from now on. Into `anyres` it gets a newline to learn, drawn from `seed`.

    Raises:
        ConfigError: `anyres` needs a grid of tokens, which the connector does not give.
    """
    model, image = loaded.model, loaded.description.image.in_mode(mode)
    loaded.description = loaded.description.with_image(image)
    connector = model.connector
    torch.manual_seed(seed)
    inner = connector.inner if isinstance(connector, TiledConnector) else connector
    model.connector = with_tiles(inner, image, model.vision_tower.num_tokens)
    if model.connector is not connector:
        loaded.rebuilt.add("connector")
        loaded.adapters.pop("connector", None)


def _part_state(state: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    if state is None:
        return None
    return {key.removeprefix(prefix + "."): value for key, value in state.items() if key.startswith(prefix + ".")}


def _save_hf(module: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    if state is None:
        module.save_pretrained(folder)
    else:
        module.save_pretrained(folder, state_dict={k: v.detach().cpu().contiguous() for k, v in state.items()})


def link_tree(source: Path, target: Path) -> None:
    """Hard-link every file of `source` into `target`, or copy where the two lie on different file systems."""
    target.mkdir(parents=True)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, destination)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            shutil.copy2(path, destination)
