"""Where transformers' image encoders keep their parts, and which class a checkpoint of any of them needs.

All of them are a stem (patch embedding, positions, CLS and register tokens), a list of blocks, and a tail (last norm,
pooling) that a tower never reads. They differ in names alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylmm.config.spec import ImageSpec

_BLOCKS = ("encoder.layers", "encoder.layer", "model.layer", "layers", "layer")
_PRE_NORMS = ("pre_layrnorm", "pre_layernorm")
"""CLIP's own spelling, and the right one."""
_CLS = ("class_embedding", "cls_token")


@dataclass(frozen=True)
class Anatomy:
    """Where one encoder keeps its parts.

    Attributes:
        blocks: dotted path of the list of blocks below the encoder.
        pre_norm: name of a norm between stem and blocks, or None.
        rope: whether `rope_embeddings` gives every block its positions (DINOv3).
        num_cls: 1 where a CLS token comes first, else 0.
        num_registers: register tokens behind it.
        fixed_size: whether the stem takes images of `config.image_size` alone; others interpolate their positions.
    """

    blocks: str
    pre_norm: str | None
    rope: bool
    num_cls: int
    num_registers: int
    fixed_size: bool

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return self.num_cls + self.num_registers


def find_anatomy(encoder: nn.Module) -> Anatomy:
    """Look at an encoder's modules and return where its parts are.

    Raises:
        ValueError: it has no `embeddings` and list of blocks in any of the known places, or takes no (B, 3, H, W) pixels.
    """
    config: Any = encoder.config
    blocks = next((path for path in _BLOCKS if isinstance(_get(encoder, path), nn.ModuleList)), None)
    stem = getattr(encoder, "embeddings", None)
    if blocks is None or stem is None:
        raise ValueError(
            f"{type(encoder).__name__} has no `embeddings` with a list of blocks in any of {', '.join(_BLOCKS)}; a tower "
            "reads encoders of the kind of CLIP, SigLIP, ViT, DINOv2 and DINOv3"
        )
    if not hasattr(config, "image_size") or not hasattr(config, "patch_size"):
        raise ValueError(
            f"{type(encoder).__name__} has no fixed image_size and patch_size (NaFlex models cut images into patches "
            "beforehand); take the fixed-resolution checkpoint of the same family"
        )
    return Anatomy(
        blocks=blocks,
        pre_norm=next((name for name in _PRE_NORMS if hasattr(encoder, name)), None),
        rope=hasattr(encoder, "rope_embeddings"),
        num_cls=int(any(getattr(stem, name, None) is not None for name in _CLS)),
        num_registers=int(config.num_register_tokens) if hasattr(stem, "register_tokens") else 0,
        fixed_size=not (hasattr(encoder, "rope_embeddings") or type(stem).__name__.startswith("Dinov2")),
    )


def get_blocks(encoder: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    """The list of blocks that the encoder holds now."""
    found = _get(encoder, anatomy.blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def set_blocks(encoder: nn.Module, anatomy: Anatomy, blocks: nn.ModuleList) -> None:
    """Put another list of blocks in its place."""
    owner, _, name = anatomy.blocks.rpartition(".")
    setattr(_get(encoder, owner) if owner else encoder, name, blocks)


def run_blocks(encoder: nn.Module, anatomy: Anatomy, pixel_values: Tensor) -> Tensor:
    """Run stem and blocks, no tail: pixels (B, 3, H, W) to hidden states (B, prefix + patches, Dv)."""
    hidden: Tensor = encoder.embeddings(pixel_values)  # type: ignore[operator]
    if anatomy.pre_norm is not None:
        hidden = getattr(encoder, anatomy.pre_norm)(hidden)
    options: dict[str, Any] = {"attention_mask": None}
    if anatomy.rope:
        options["position_embeddings"] = encoder.rope_embeddings(pixel_values)  # type: ignore[operator]
    for block in get_blocks(encoder, anatomy):
        hidden = block(hidden, **options)
    return hidden


def _get(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


KINDS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "vit": "ViTModel",
}
"""`model_type` in a checkpoint's config.json -> class of transformers that a tower can read."""


class HubEncoder(PreTrainedModel):
    """Stands for the class that a checkpoint itself names, one of KINDS: `vision_tower=hf`.

    `from_pretrained` returns that class's model, never a HubEncoder. It runs no code of the checkpoint.
    """

    @classmethod
    def from_pretrained(cls, where: Any, *args: Any, **options: Any) -> Any:
        """Load the encoder at `where`, a hub id or a folder.

        Raises:
            ValueError: its `model_type` is none of KINDS.
        """
        import transformers

        known = {key: options[key] for key in ("revision", "local_files_only") if key in options}
        config, _ = transformers.PreTrainedConfig.get_config_dict(where, **known)
        kind = config.get("model_type")
        if kind not in KINDS:
            raise ValueError(f"'{where}' is of model_type '{kind}'; vision_tower=hf reads {', '.join(KINDS)}")
        return getattr(transformers, KINDS[kind]).from_pretrained(where, *args, **options)


def refuse_other_normalisation(where: str, revision: str | None, image: ImageSpec) -> None:
    """Compare `image` with the preprocessor_config.json of a checkpoint, where it has one.

    Args:
        where: hub id or folder.
        image: `mean` and `std` that the tower's images are to be normalised with.

    Raises:
        ValueError: they differ: the encoder would see images as it never did in its training.
    """
    from transformers.utils.hub import cached_file

    path = cached_file(
        where,
        "preprocessor_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    fields = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    for key in ("mean", "std"):
        own, set_to = fields.get(f"image_{key}"), list(getattr(image, key))
        if own is not None and max(abs(a - b) for a, b in zip(own, set_to, strict=True)) > 1e-4:
            raise ValueError(
                f"image.{key} is {set_to}, but '{where}' was trained with {own} (its preprocessor_config.json); "
                f"set vision_tower.image.{key}={own}"
            )


def renormalise(pixel_values: Tensor, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the normalisation (mean, std) `source` of pixels (B, 3, H, W), each (3,), and apply `target`."""
    (mean, std), (new_mean, new_std) = (tuple(t.to(pixel_values.device) for t in pair) for pair in (source, target))
    scale, shift = std / new_std, (mean - new_mean) / new_std
    return (pixel_values.float() * scale.view(3, 1, 1) + shift.view(3, 1, 1)).to(pixel_values.dtype)
