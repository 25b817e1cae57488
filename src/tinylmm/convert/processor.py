"""transformers' LlavaProcessor for one of our models: image processor, tokenizer, number of image tokens."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinylmm.models.vision import HFVisionTower

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of its filters."""


def make_processor(
    image: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tower: HFVisionTower, chat_template: str | None
) -> LlavaProcessor:
    """Build the processor that prepares images and text as our own code does.

    Args:
        image: our `image` settings.
        tokenizer: knows the image token `<image>`.
        tower: says patches and tokens.
        chat_template: Jinja source, or None.
    """
    return LlavaProcessor(
        _image_processor(image),
        tokenizer,
        patch_size=int(tower.config.patch_size),
        vision_feature_select_strategy="default" if dropped_tokens(tower) else "full",
        num_additional_image_tokens=tower.num_prefix,
        chat_template=chat_template,
    )


def dropped_tokens(tower: HFVisionTower) -> int:
    """How many tokens of the layer that is read are dropped, first ones first."""
    return tower.num_prefix + (tower.image_size // int(tower.config.patch_size)) ** 2 - tower.num_tokens


def mode_of(image: dict[str, Any]) -> str:
    """What is done to images; `square` stands for the tower's own way."""
    return str(image.get("square", "squash") if image["mode"] == "square" else image["mode"])


def _image_processor(image: dict[str, Any]) -> Any:
    size = image["size"]
    square = {"height": size, "width": size}
    mode = mode_of(image)
    common = {"image_mean": image["mean"], "image_std": image["std"], "resample": RESAMPLE[image["resample"]]}
    if mode == "center_crop":
        return CLIPImageProcessorPil(
            size={"shortest_edge": image.get("short_edge") or size}, crop_size=square, **common
        )
    if mode == "pad":
        return LlavaImageProcessorPil(size=square, do_pad=True, do_center_crop=False, **common)
    return SiglipImageProcessorPil(size=square, **common)
