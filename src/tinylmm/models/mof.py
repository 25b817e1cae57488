"""Mixture of features: CLIP and DINOv2 on one image, their tokens interleaved (arXiv 2401.06209, section 4.2).

The patches of both lie on the same grid, so token 2i is CLIP's and token 2i + 1 DINOv2's view of patch i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, PreTrainedConfig, PreTrainedModel

from tinylmm.config.spec import ImageSpec
from tinylmm.models.encoders import find_anatomy, get_blocks, renormalise, run_blocks
from tinylmm.models.vision import HFVisionTower, checked_size, cut_behind, whole_state

ENCODERS = ("clip", "dinov2")
SEPARATOR = "+"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""What DINOv2's images are normalised with: its preprocessor_config.json."""


class MoFConfig(PreTrainedConfig):
    """Configs of the two encoders."""

    model_type = "tinylmm_mof"
    sub_configs = {"clip": CLIPVisionConfig, "dinov2": Dinov2Config}  # noqa: RUF012

    def __init__(self, clip: Any = None, dinov2: Any = None, **kwargs: Any) -> None:
        self.clip = clip if isinstance(clip, CLIPVisionConfig) else CLIPVisionConfig(**(clip or {}))
        self.dinov2 = dinov2 if isinstance(dinov2, Dinov2Config) else Dinov2Config(**(dinov2 or {}))
        super().__init__(**kwargs)


class MoFEncoder(PreTrainedModel):
    """Holds a CLIP and a DINOv2 encoder, so that both are one part: one folder, one set of weights."""

    config_class = MoFConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MoFConfig) -> None:
        super().__init__(config)
        self.clip = CLIPVisionModel._from_config(config.clip)
        self.dinov2 = Dinov2Model._from_config(config.dinov2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each encoder has drawn its own weights."""

    @classmethod
    def from_pretrained(cls, where: Any, *args: Any, **options: Any) -> Any:
        """Load a folder that holds both, or `CLIP+DINOv2`, the hub ids or folders of the two (revisions likewise).

        Raises:
            ValueError: `where` is neither.
        """
        if Path(where).is_dir():
            return super().from_pretrained(where, *args, **options)
        names = str(where).split(SEPARATOR)
        if len(names) != len(ENCODERS):
            raise ValueError(f"'{where}' names no two encoders; write CLIP{SEPARATOR}DINOV2, two hub ids or folders")
        revision = options.pop("revision", None)
        revisions = revision.split(SEPARATOR) if revision else [None, None]
        if len(revisions) != len(ENCODERS):
            raise ValueError(f"revision '{revision}' names no two commits; write COMMIT{SEPARATOR}COMMIT")
        clip = CLIPVisionModel.from_pretrained(names[0], *args, revision=revisions[0], **options)
        dinov2 = Dinov2Model.from_pretrained(names[1], *args, revision=revisions[1], **options)
        with torch.device("meta"):  # a shell: both encoders are put into it whole
            both = cls(MoFConfig(clip.config, dinov2.config))
        both.clip, both.dinov2 = clip, dinov2
        return both


class MoFTower(HFVisionTower):
    """CLIP's and DINOv2's features of one layer, interleaved patch by patch.

    Both see the same crop, prepared and normalised for CLIP; DINOv2 gets it in its own normalisation.

    Args:
        encoder: a `MoFEncoder`.
        select_layer, drop_first_token, image: as in `HFVisionTower`, for both; `image.mean` and `image.std` say how the
            pixels that come in are normalised.
        select: "patch" alone: CLS and register tokens have no partner on the grid.
        reference: hand DINOv2 the pixels in CLIP's normalisation, as TinyLLaVA Factory's `vision_tower/mof.py` does, whose
            models were trained so.

    Raises:
        ValueError: the two differ in width, depth or patch grid.
    """

    streams = 2

    def __init__(
        self,
        encoder: MoFEncoder,
        select_layer: int,
        select: str,
        drop_first_token: bool,
        image: ImageSpec,
        reference: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        if select != "patch":
            raise ValueError(f"select is '{select}', but a mixture of features interleaves patches; set select=patch")
        self.encoder = encoder
        self.select = select
        self.drop_first_token = drop_first_token
        self.reference = reference
        self._parts = [(name, find_anatomy(getattr(encoder, name))) for name in ENCODERS]
        self._image_size = checked_size(encoder.clip, self._parts[0][1], image)
        checked_size(encoder.dinov2, self._parts[1][1], image)
        self._refuse_mismatch()
        cut = {name: cut_behind(getattr(encoder, name), anatomy, select_layer) for name, anatomy in self._parts}
        self.depth = cut["clip"][0]
        self._unused = {name: blocks for name, (_, blocks) in cut.items()}
        own = (torch.tensor(image.mean), torch.tensor(image.std))
        self._normalisations = (own, (torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)))

    def _refuse_mismatch(self) -> None:
        clip, dinov2 = self.encoder.clip.config, self.encoder.dinov2.config  # type: ignore[union-attr]
        for what, name in (("width", "hidden_size"), ("depth", "num_hidden_layers"), ("patch size", "patch_size")):
            if getattr(clip, name) != getattr(dinov2, name):
                raise ValueError(
                    f"a mixture of features needs two encoders of equal {what}, but CLIP's is "
                    f"{getattr(clip, name)} and DINOv2's {getattr(dinov2, name)}"
                )

    @property
    def blocks(self) -> nn.ModuleList:
        """Pairs of blocks that are run, first to last: block i of CLIP with block i of DINOv2."""
        stacks = [get_blocks(getattr(self.encoder, name), anatomy) for name, anatomy in self._parts]
        return nn.ModuleList(nn.ModuleList(pair) for pair in zip(*stacks, strict=True))

    @property
    def hidden_size(self) -> int:
        """Dv, the width of both."""
        return int(self.encoder.clip.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def has_cls(self) -> bool:
        """True: both encoders have one."""
        return True

    @property
    def num_tokens(self) -> int:
        """P, twice the patches."""
        patch = int(self.encoder.clip.config.patch_size)  # type: ignore[union-attr, arg-type]
        return 2 * ((self.image_size // patch) ** 2 - int(self.drop_first_token))

    @property
    def num_dropped(self) -> int:
        """Tokens left out at the front of either hidden state."""
        return self._parts[0][1].num_prefix + int(self.drop_first_token)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W), normalised for CLIP, to features (B, 2 x patches, Dv)."""
        for_dinov2 = pixel_values if self.reference else renormalise(pixel_values, *self._normalisations)
        features = []
        for (name, anatomy), pixels in zip(self._parts, (pixel_values, for_dinov2), strict=True):
            hidden = run_blocks(getattr(self.encoder, name), anatomy, pixels)
            features.append(hidden[:, anatomy.num_prefix + int(self.drop_first_token) :])
        return torch.stack(features, dim=2).flatten(1, 2)

    def whole_encoder_state(self) -> dict[str, Tensor]:
        """Return both encoders' tensors with the blocks that are not run back in their places."""
        return {
            f"{name}.{key}": tensor
            for name, anatomy in self._parts
            for key, tensor in whole_state(
                cast(nn.Module, getattr(self.encoder, name)), anatomy, self._unused[name]
            ).items()
        }
