"""How images are prepared: our `image` settings from other tools' files, and transformers' image processor from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinylmm.convert.configs import CLIP, SIGLIP, known_tower
from tinylmm.convert.source import Source, read_json_if_any
from tinylmm.errors import UserError

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Our names of Pillow's filters -> Pillow's numbers."""
USUAL_IMAGES = {
    CLIP: {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "mode": "center_crop",
        "resample": "bicubic",
    },
    SIGLIP: {"mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash", "resample": "bicubic"},
}
"""Preprocessing of the published CLIP and SigLIP towers (their preprocessor_config.json), where a checkpoint has none."""
FIXED_SIZE = (CLIP, SIGLIP)
"""Towers that take images of `config.image_size` alone; others interpolate their positions."""


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
    image = None
    for folder in (source.folder, source.tower):
        image = image or (None if folder is None else _processor_settings(folder))
    if image is None and (known := known_tower(name)):
        image = dict(known["image"]) | ({"size": config.image_size} if config.model_type in FIXED_SIZE else {})
        source.notes.append(f"image preprocessing is not stored in the checkpoint; taken from the published '{name}'")
    if image is None and config.model_type in USUAL_IMAGES:
        image = {"size": config.image_size, **USUAL_IMAGES[config.model_type]}
        source.notes.append(
            f"image preprocessing is not stored in the checkpoint; the usual one of {config.model_type} is taken"
        )
    if image is None:
        raise UserError(
            f"how images are prepared for the tower '{name}' ({config.model_type}) is stored nowhere. "
            "Give its folder with its preprocessor_config.json: --tower FOLDER."
        )
    if aspect == "pad":
        image["mode"] = "pad"
    elif aspect not in (None, "square"):
        raise UserError(f"image_aspect_ratio is '{aspect}', which cannot be imported. Importable are: square and pad.")
    if image["size"] != config.image_size and config.model_type in FIXED_SIZE:
        raise UserError(f"images are prepared at {image['size']} pixels, but the tower takes {config.image_size}.")
    return image


def _processor_settings(folder: Path) -> dict[str, Any] | None:
    """Translate a preprocessor_config.json (or processor_config.json) of CLIP's, SigLIP's or Llava's image processor."""
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        content = read_json_if_any(path)
        content = content.get("image_processor", content)
        if "image_mean" in content:
            break
    else:
        return None
    cropped = content.get("do_center_crop", False) and not content.get("do_pad")
    size = _edge(content["crop_size"] if cropped else content["size"])
    mode = "pad" if content.get("do_pad") else "center_crop" if cropped else "squash"
    number = content.get("resample", RESAMPLE["bicubic"])
    resample = next((name for name, known in RESAMPLE.items() if known == number), None)
    if resample is None:
        allowed = " and ".join(f"{known} ({name})" for name, known in RESAMPLE.items())
        raise UserError(f"{path}: resample is {number}; importable are {allowed}.")
    return {
        "size": size,
        "mean": [float(value) for value in content["image_mean"]],
        "std": [float(value) for value in content["image_std"]],
        "mode": mode,
        "resample": resample,
        **({"short_edge": _edge(content["size"])} if cropped and _edge(content["size"]) != size else {}),
    }


def _edge(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else int(size.get("height") or size.get("shortest_edge") or 0)


def mode_of(image: dict[str, Any]) -> str:
    """What is done to images; `square` stands for the tower's own way."""
    return str(image.get("square", "squash") if image["mode"] == "square" else image["mode"])


def image_processor(image: dict[str, Any]) -> Any:
    """Return the image processor of transformers that prepares images as our `image` settings say.

    `crop_size` stands in all of them: LlavaProcessor, and vLLM with it, count an image's tokens by it, cropped or not.
    """
    size = image["size"]
    square = {"height": size, "width": size}
    mode = mode_of(image)
    common = {
        "image_mean": image["mean"],
        "image_std": image["std"],
        "resample": RESAMPLE[image["resample"]],
        "crop_size": square,
    }
    if mode == "center_crop":
        return CLIPImageProcessorPil(size={"shortest_edge": image.get("short_edge") or size}, **common)
    if mode == "pad":
        return LlavaImageProcessorPil(size=square, do_pad=True, do_center_crop=False, **common)
    return SiglipImageProcessorPil(size=square, do_center_crop=False, **common)
