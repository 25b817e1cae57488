"""Vision towers: images in, the tokens of one chosen layer out.

Shapes: B images, H = W = input size in pixels, P tokens an image, Dv the tower's width.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tinylmm.config.identities import TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.errors import ConfigError, Fault
from tinylmm.models.encoders import Anatomy, find_anatomy, get_blocks, run_blocks, set_blocks


class HFVisionTower(nn.Module):
    """An image encoder of transformers, read at one hidden layer as LLaVA does (arXiv 2310.03744, section 3.2).

    Blocks behind the chosen layer are never run and never trained; they are kept aside so that a saved tower is whole.
    A tower of which nothing is trained stays in evaluation mode, whatever `train()` says: no dropout in frozen features.

    Args:
        encoder: a CLIP, SigLIP, ViT, DINOv2 or DINOv3 model, see `encoders.find_anatomy`.
        select_layer: index into the hidden states, where 0 is the embedding and -1 the last block's output.
        select: "patch" drops the CLS and register tokens where the encoder has them, "all" keeps them.
        drop_first_token: also drop the first patch (728 of 729 SigLIP tokens in published TinyLLaVA Factory checkpoints).
        image: the tower's image preprocessing, of which `size` says how large its input is; by default the encoder's.

    Raises:
        ValueError: the encoder is of another shape, or `select_layer` or the image size lie outside what it can do.
    """

    streams = 1
    """Encoders whose tokens lie interleaved in P."""

    def __init__(
        self,
        encoder: nn.Module,
        select_layer: int,
        select: str,
        drop_first_token: bool,
        image: ImageSpec | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.select = select
        self.drop_first_token = drop_first_token
        self._anatomy = find_anatomy(encoder)
        self._image_size = checked_size(encoder, self._anatomy, image)
        self.depth, self._unused_blocks = cut_behind(encoder, self._anatomy, select_layer)
        if self._still is not None:
            self._still.eval()

    @property
    def _still(self) -> nn.Module | None:
        """What never trains: DINOv3's rotary positions, which its own pretraining stretches at random."""
        return getattr(self.encoder, "rope_embeddings", None)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that are run, first to last."""
        return get_blocks(self.encoder, self._anatomy)

    @property
    def config(self) -> Any:
        """The encoder's Hugging Face config."""
        return self.encoder.config

    @property
    def hidden_size(self) -> int:
        """Dv."""
        return int(self.config.hidden_size)

    @property
    def has_cls(self) -> bool:
        """Whether the encoder puts a CLS token in front of its patches."""
        return bool(self._anatomy.num_cls)

    @property
    def num_prefix(self) -> int:
        """CLS and register tokens in front of the patches."""
        return self._anatomy.num_prefix

    @property
    def num_tokens(self) -> int:
        """P, the tokens that come out for one image."""
        patches = (self.image_size // int(self.config.patch_size)) ** 2
        return patches + self._anatomy.num_prefix - self.num_dropped

    @property
    def image_size(self) -> int:
        """H = W in pixels."""
        return self._image_size

    @property
    def num_dropped(self) -> int:
        """Tokens left out at the front of the hidden state: CLS and registers, and the first patch where that is asked."""
        return (self._anatomy.num_prefix if self.select == "patch" else 0) + int(self.drop_first_token)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, H, W) to features (B, P, Dv)."""
        return run_blocks(self.encoder, self._anatomy, pixel_values)[:, self.num_dropped :]

    def train(self, mode: bool = True) -> Self:
        """Set training mode where something is trained; DINOv3's random stretching of positions stays off always."""
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        if self._still is not None:
            self._still.eval()
        return self

    def whole_encoder_state(self) -> dict[str, Tensor]:
        """Return the encoder's state dict with the blocks that are not run back in their places."""
        return whole_state(self.encoder, self._anatomy, self._unused_blocks)


def checked_size(encoder: nn.Module, anatomy: Anatomy, image: ImageSpec | None) -> int:
    """H = W in pixels that the encoder is to be given.

    Raises:
        ValueError: it takes another size alone, or one that its patches do not fill.
    """
    own, patch = int(encoder.config.image_size), int(encoder.config.patch_size)  # type: ignore[union-attr, arg-type]
    size = own if image is None else image.size
    if size != own and anatomy.fixed_size:
        raise ValueError(f"image.size is {size}, but {type(encoder).__name__} takes {own} pixels alone; set {own}")
    if not anatomy.fixed_size and size % patch:
        raise ValueError(f"image.size is {size}, no multiple of the encoder's patches of {patch} pixels")
    return size


def cut_behind(encoder: nn.Module, anatomy: Anatomy, select_layer: int) -> tuple[int, list[nn.Module]]:
    """Take the blocks behind hidden state `select_layer` out of the encoder; return its depth and those blocks.

    They come back in a plain list, which hides them from parameters(), .to() and DDP: nothing can train or wait for them.

    Raises:
        ValueError: `select_layer` lies outside the hidden states.
    """
    blocks = get_blocks(encoder, anatomy)
    depth = len(blocks)
    num_run = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 0 <= num_run <= depth:
        raise ValueError(f"select_layer {select_layer} lies outside the tower's hidden states 0 to {depth}")
    set_blocks(encoder, anatomy, blocks[:num_run])
    return depth, list(blocks[num_run:])


def whole_state(encoder: nn.Module, anatomy: Anatomy, unused_blocks: list[nn.Module]) -> dict[str, Tensor]:
    """State dict of a cut encoder with `unused_blocks` back in their places."""
    state = dict(encoder.state_dict())
    first = len(get_blocks(encoder, anatomy))
    for offset, block in enumerate(unused_blocks):
        for name, tensor in block.state_dict().items():
            state[f"{anatomy.blocks}.{first + offset}.{name}"] = tensor
    return state


def make_tower(tower_class: Any, encoder: nn.Module, output: TowerOutput, image: ImageSpec) -> HFVisionTower:
    """Put a tower class around a loaded encoder.

    Args:
        output: how its output is read; its options are the class's own.
        image: the tower's image preprocessing.

    Raises:
        ConfigError: the encoder, the layer or an option does not fit.
    """
    read = {"select_layer": output.select_layer, "select": output.select, "drop_first_token": output.drop_first_token}
    try:
        return cast(HFVisionTower, tower_class(encoder, **read, image=image, **output.options))
    except (TypeError, ValueError) as error:
        raise ConfigError([Fault("vision_tower", str(error))]) from error


def num_parameters(module: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum({id(p): p.numel() for p in module.parameters()}.values())


@torch.no_grad()
def encode_images(tower: HFVisionTower, pixel_values: Tensor) -> Tensor:
    """Run a frozen tower on (B, 3, H, W) without a graph, in the tower's own dtype, giving (B, P, Dv)."""
    parameter = next(tower.parameters())
    return tower(pixel_values.to(device=parameter.device, dtype=parameter.dtype))
