"""transformers' configs of the parts of a foreign checkpoint, read as data. No code of it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tinylmm.config.groups import conf_folder
from tinylmm.errors import UserError
from tinylmm.models import openelm  # noqa: F401  registers its config with transformers

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
_KIND_OF_ENCODER = {
    "transformers.Dinov2Model": "dinov2",
    "transformers.CLIPVisionModel": CLIP,
    "transformers.SiglipVisionModel": SIGLIP,
}
"""`encoder` of conf/vision_tower -> `model_type`, where the file has the numbers of the published config."""
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
        UserError: transformers has no such model, or no such model with these fields.
    """
    kind = kind or str(fields.get("model_type"))
    known = {key: value for key, value in fields.items() if key not in (*_NOT_OURS, "model_type")}
    if kind not in CONFIG_MAPPING:
        raise UserError(f"the checkpoint's part is of type '{kind}', which transformers does not have.")
    try:
        return cast(PreTrainedConfig, CONFIG_MAPPING[kind].from_dict(known))
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's part of type '{kind}' has a config that is none: {reason}") from error


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
    kind = _KIND_OF_ENCODER.get(str(content.get("encoder")))
    return make_config(content["architecture"], kind) if kind is not None else None
