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
        num_additional_image_tokens=int(tower.has_cls),
        chat_template=chat_template,
    )


def dropped_tokens(tower: HFVisionTower) -> int:
    """How many tokens of the layer that is read are dropped, first ones first."""
    return int(tower.has_cls and tower.select == "patch") + int(tower.drop_first_token)


def _image_processor(image: dict[str, Any]) -> Any:
    size = image["size"]
    square = {"height": size, "width": size}
    common = {"image_mean": image["mean"], "image_std": image["std"], "resample": RESAMPLE[image["resample"]]}
    if image["mode"] == "center_crop":
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **common)
    if image["mode"] == "pad":
        return LlavaImageProcessorPil(size=square, do_pad=True, do_center_crop=False, **common)
    return SiglipImageProcessorPil(size=square, **common)
