"""Configs, image preprocessing, tokenizer and template of a foreign checkpoint, read as data. No code of it runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tinylmm.config.groups import conf_folder
from tinylmm.convert.source import Source, read_json
from tinylmm.data.chat import TEMPLATES, VICUNA_SYSTEM, get_template
from tinylmm.errors import DataError, UserError
from tinylmm.models.openelm import OpenELMConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
BY_KIND = {
    "clip_vision_model": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "mode": "center_crop",
        "resample": "bicubic",
    },
    "siglip_vision_model": {"mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash", "resample": "bicubic"},
}
"""Preprocessing of the published CLIP and SigLIP towers (their preprocessor_config.json), where a checkpoint has none."""
FIXED_SIZE = ("clip_vision_model", "siglip_vision_model")
"""Towers that take images of `config.image_size` alone; others interpolate their positions."""
_NOT_OURS = (
    "auto_map",
    "_name_or_path",
    "architectures",
    "transformers_version",
    "model_name_or_path",
    "model_name_or_path2",
)
_LEGACY = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")
_STABLELM_EPOCH = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}


def make_config(fields: Mapping[str, Any], kind: str | None = None) -> PreTrainedConfig:
    """Build a transformers config of `kind` (default: the fields' own `model_type`) from plain JSON fields.

    Raises:
        UserError: transformers has no such model.
    """
    kind = kind or str(fields.get("model_type"))
    known = {key: value for key, value in fields.items() if key not in (*_NOT_OURS, "model_type")}
    if kind == OpenELMConfig.model_type:
        return OpenELMConfig(**known)
    if kind not in CONFIG_MAPPING:
        raise UserError(f"the checkpoint's part is of type '{kind}', which transformers does not have.")
    return cast(PreTrainedConfig, CONFIG_MAPPING[kind].from_dict(known))


def flat_llm_config(fields: Mapping[str, Any], kind: str) -> PreTrainedConfig:
    """Build an LLM's config from a config.json that mixes its fields with LLaVA's own (`mm_...`)."""
    if kind == "stablelm":
        fields = {_STABLELM_EPOCH.get(key, key): value for key, value in fields.items()}
    known = {*CONFIG_MAPPING[kind]().to_dict(), *_LEGACY}
    return make_config({key: value for key, value in fields.items() if key in known}, kind)


def vision_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a tower's config; of a whole CLIP or SigLIP model, the vision part is taken."""
    return make_config(cast("Mapping[str, Any]", fields.get("vision_config", fields)))


def known_tower(name: str) -> dict[str, Any] | None:
    """Return the shipped conf/vision_tower file for a hub id, or None; Bench's finetuned SigLIPs count as SigLIP."""
    if "tinyllava" in name.lower() and name.lower().endswith("siglip"):
        name = "google/siglip-so400m-patch14-384"
    for path in sorted((conf_folder() / "vision_tower").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if content.get("pretrained") == name:
            return cast(dict[str, Any], content)
    return None


def known_tower_config(name: str) -> PreTrainedConfig | None:
    """Return the config of a published tower by hub id, or None."""
    content = known_tower(name)
    if content is None:
        return None
    encoder = str(content.get("encoder", ""))
    kinds = {
        "transformers.Dinov2Model": "dinov2",
        "transformers.CLIPVisionModel": "clip_vision_model",
        "transformers.SiglipVisionModel": "siglip_vision_model",
    }
    return make_config(content["architecture"], kinds[encoder]) if encoder in kinds else None


def image_settings(source: Source, config: PreTrainedConfig, name: str, aspect: str | None) -> dict[str, Any]:
    """Return our `image` settings: from the checkpoint's own files, the tower's folder, a known hub id, or the tower's kind.

    Args:
        source: the checkpoint.
        config: the tower's.
        name: what the checkpoint calls its tower.
        aspect: LLaVA's `image_aspect_ratio`; "pad" squares the image first, "square" or None leave the tower's own way.

    Raises:
        UserError: anything else is asked for, or nobody knows the tower's preprocessing.
    """
    settings = None
    for folder in (source.folder, source.tower):
        settings = settings or (None if folder is None else _processor_settings(folder))
    if settings is None and (known := known_tower(name)):
        settings = dict(known["image"]) | ({"size": config.image_size} if config.model_type in FIXED_SIZE else {})
        source.notes.append(f"image preprocessing is not stored in the checkpoint; taken from the published '{name}'")
    if settings is None and config.model_type in BY_KIND:
        settings = {"size": config.image_size, **BY_KIND[config.model_type]}
        source.notes.append(
            f"image preprocessing is not stored in the checkpoint; the usual one of {config.model_type} is taken"
        )
    if settings is None:
        raise UserError(
            f"how images are prepared for the tower '{name}' ({config.model_type}) is stored nowhere. "
            "Give its folder with its preprocessor_config.json: --tower FOLDER."
        )
    if aspect == "pad":
        settings["mode"] = "pad"
    elif aspect not in (None, "square"):
        raise UserError(f"image_aspect_ratio is '{aspect}', which cannot be imported. Importable are: square and pad.")
    if settings["size"] != config.image_size and config.model_type in FIXED_SIZE:
        raise UserError(f"images are prepared at {settings['size']} pixels, but the tower takes {config.image_size}.")
    return settings


def _processor_settings(folder: Path) -> dict[str, Any] | None:
    """Translate a preprocessor_config.json (or processor_config.json) of CLIP's, SigLIP's or Llava's image processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            content = content.get("image_processor", content)
            if "image_mean" in content:
                break
    else:
        return None
    cropped = content.get("do_center_crop", False) and not content.get("do_pad")
    size = _edge(content["crop_size"] if cropped else content["size"])
    mode = "pad" if content.get("do_pad") else "center_crop" if cropped else "squash"
    filters = {2: "bilinear", 3: "bicubic"}
    if content.get("resample", 3) not in filters:
        raise UserError(
            f"{folder / name}: resample is {content['resample']}; importable are 2 (bilinear) and 3 (bicubic)."
        )
    return {
        "size": size,
        "mean": [float(value) for value in content["image_mean"]],
        "std": [float(value) for value in content["image_std"]],
        "mode": mode,
        "resample": filters[content.get("resample", 3)],
        **({"short_edge": _edge(content["size"])} if cropped and _edge(content["size"]) != size else {}),
    }


def _edge(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else int(size.get("height") or size.get("shortest_edge") or 0)


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the checkpoint, or else from the LLM's base folder; it has a padding token afterwards.

    Its files are read from a copy without config.json, whose `model_type` and `auto_map` are not ours to follow.

    Raises:
        UserError: neither folder has one.
        DataError: it cannot be loaded.
    """
    folders = [f for f in (source.folder, source.llm) if f is not None]
    found = next(
        (f for f in folders if any((f / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))),
        None,
    )
    if found is None:
        raise UserError(
            f"{source.folder} holds no tokenizer. Give the folder of the language model it was trained on, with its tokenizer: "
            "--llm FOLDER."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name in TOKENIZER_FILES:
            if (found / name).is_file():
                shutil.copy2(found / name, Path(temporary) / name)
        try:
            settings = read_json(found / "tokenizer_config.json") if (found / "tokenizer_config.json").is_file() else {}
            if "tokenizer_class" in settings and "auto_map" not in settings:
                tokenizer = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
            else:  # a tokenizer.json says everything but the names of the special tokens, which lie beside it
                tokenizer = PreTrainedTokenizerFast.from_pretrained(temporary, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise DataError(f"the tokenizer in {found} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer.name_or_path = found.name  # not the temporary folder's
    for key in ("name_or_path", "is_local", "local_files_only"):  # how it was loaded is no property of it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token is None:
        wanted = source.config.get("pad_token") or tokenizer.unk_token or tokenizer.eos_token
        tokenizer.pad_token = wanted
        source.notes.append(f"the tokenizer has no padding token; '{wanted}' is taken")
    return cast(PreTrainedTokenizerBase, tokenizer)


def choose_template(source: Source, tokenizer: PreTrainedTokenizerBase, llm_kind: str) -> str:
    """Return the chat template's name: the user's, or the family's for this LLM's EOS. No layout but ours stores it.

    Raises:
        ConfigError: the user's is unknown.
        UserError: none of the family's ends answers with the tokenizer's EOS.
    """
    if source.template is not None:
        return get_template(source.template).name
    fitting = [t.name for t in TEMPLATES.values() if t.system == VICUNA_SYSTEM and t.eos == tokenizer.eos_token]
    fitting.sort(key=lambda name: not llm_kind.startswith(name.split("_")[0]))  # stable: the LLM's own first
    if not fitting:
        raise UserError(
            f"the checkpoint does not say its chat template, and none of the family's ends answers with "
            f"'{tokenizer.eos_token}'. Name the one it was trained with: --template (one of {', '.join(TEMPLATES)})."
        )
    source.notes.append(
        f"the chat template is not stored in the checkpoint; '{fitting[0]}' is taken for its end token "
        f"'{tokenizer.eos_token}' (--template says another)"
    )
    return fitting[0]
