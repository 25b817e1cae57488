"""Export to TinyLLaVA Factory's layouts: one merged save, or the three folders that its next stage starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinylmm.convert.configs import BY_KIND
from tinylmm.convert.connectors import from_ours, type_of_spec
from tinylmm.convert.factory_reader import CONNECTOR, LLM, TOWER
from tinylmm.convert.processor import dropped_tokens, mode_of
from tinylmm.convert.report import ExportReport, draft_of
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.vision import HFVisionTower


def export_factory(
    loaded: LoadedModel, destination: Path, dtype: torch.dtype, folders: bool, llm: str | None, tower: str | None
) -> ExportReport:
    """Write the model as the Factory does.

    Args:
        loaded: the model.
        destination: a folder that does not exist yet.
        dtype: of the written weights.
        folders: three folders of pickles (its pretraining's layout) instead of one safetensors save.
        llm, tower: what the Factory shall load tokenizer and image processor from (hub id or folder); None takes the names
            that the checkpoint was imported with.

    Raises:
        UserError: a name is missing, or the Factory has no such connector or token selection.
    """
    origin = loaded.description.get("origin", {})
    names = {"llm": llm or origin.get("llm"), "tower": tower or origin.get("vision_tower")}
    if missing := [f"--{option}" for option, name in names.items() if not name]:
        raise UserError(
            f"the Factory loads tokenizer and image processor by name, and this model does not say them: "
            f"give {' and '.join(missing)} (a hub id such as microsoft/phi-2, or a folder)."
        )
    notes: list[str] = []
    config = _config(loaded, str(names["llm"]), str(names["tower"]), notes)
    parts = {name: {k: v.to(dtype).contiguous() for k, v in part.items()} for name, part in _parts(loaded).items()}
    with draft_of(destination) as draft:
        (draft / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        loaded.tokenizer.save_pretrained(draft)
        if folders:
            _write_folders(draft, parts, config)
        else:
            prefixes = {"llm": LLM, "vision_tower": TOWER, "connector": CONNECTOR}
            whole = {prefixes[part] + name: tensor for part, found in parts.items() for name, tensor in found.items()}
            save_file(whole, draft / "model.safetensors", metadata={"format": "pt"})
    count = sum(len(part) for part in parts.values())
    notes.append(f"the Factory does not store chat templates; ours is '{loaded.model.template}' (its --conv_version)")
    return ExportReport("factory-folders" if folders else "factory", count, None, notes)


def _parts(loaded: LoadedModel) -> dict[str, dict[str, Tensor]]:
    """Tensors by the Factory's names below each part; tied ones once, as it saves them."""
    llm = {name: parameter.detach() for name, parameter in loaded.model.llm.named_parameters()}
    tower = {f"vision_model.{name}": tensor for name, tensor in loaded.model.vision_tower.whole_encoder_state().items()}
    connector = from_ours(loaded.description["connector"], dict(loaded.model.connector.state_dict()))
    return {"llm": llm, "vision_tower": tower, "connector": connector}


def _config(loaded: LoadedModel, llm_name: str, tower_name: str, notes: list[str]) -> dict[str, Any]:
    model, tower, image = loaded.model, loaded.model.vision_tower, loaded.description["image"]
    llm = model.config
    usual = BY_KIND.get(str(tower.config.model_type), {})
    if any(image[key] != value for key, value in usual.items() if key != "mode") or (
        mode_of(image) not in ("pad", usual.get("mode"))
    ):
        notes.append(f"the Factory prepares images as '{tower_name}' says, and this model was trained with {image}")
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": llm_name,
        "tokenizer_name_or_path": llm_name,
        "vision_model_name_or_path": tower_name,
        "vision_model_name_or_path2": "",
        "connector_type": type_of_spec(loaded.description["connector"]),
        "hidden_size": model.connector.llm_dim,
        "vocab_size": llm.vocab_size,
        "vision_hidden_size": tower.hidden_size,
        "vision_feature_layer": len(tower.blocks) - tower.depth - 1,
        "vision_feature_select_strategy": _strategy(tower),
        "image_aspect_ratio": "pad" if image["mode"] == "pad" else "square",
        "image_token_index": -200,
        "ignore_index": -100,
        "pad_token": loaded.tokenizer.pad_token,
        "pad_token_id": loaded.tokenizer.pad_token_id,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": int(getattr(llm, "max_position_embeddings", 2048)),
        "tokenizer_use_fast": True,
        "use_cache": True,
        "text_config": llm.to_dict(),
        "vision_config": {**tower.config.to_dict(), "model_name_or_path": tower_name, "model_name_or_path2": ""},
    }


def _strategy(tower: HFVisionTower) -> str:
    """The Factory's "patch" drops index 0 of any tower, its "cls_patch" nothing."""
    if type(tower) is not HFVisionTower:
        raise UserError(f"the tower is {type(tower).__name__}, for which TinyLLaVA Factory's layout has no names here.")
    dropped = dropped_tokens(tower)
    if dropped > 1:
        raise UserError(
            "the Factory drops at most one token of a tower, and this model drops the CLS token and a patch."
        )
    return "patch" if dropped else "cls_patch"


def _write_folders(folder: Path, parts: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> None:
    for name, part in (("language_model", "llm"), ("vision_tower", "vision_tower"), ("connector", "connector")):
        (folder / name).mkdir()
        prefix = "_connector." if part == "connector" else ""
        torch.save({prefix + key: tensor for key, tensor in parts[part].items()}, folder / name / "pytorch_model.bin")
    for name, key in (("language_model", "text_config"), ("vision_tower", "vision_config")):
        (folder / name / "config.json").write_text(json.dumps(config[key], indent=1) + "\n", encoding="utf-8")
