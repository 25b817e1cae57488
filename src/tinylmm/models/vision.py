"""Vision towers: images in, the tokens of one chosen layer out.

Shapes: B images, H = W = input size in pixels, P tokens an image, Dv the tower's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HFVisionTower(nn.Module):
    """A CLIP or SigLIP encoder of transformers, read at one hidden layer as LLaVA does (arXiv 2310.03744, section 3.2).

    Blocks behind the chosen layer are never run and never trained; they are kept aside so that a saved tower is whole.

    Args:
        encoder: a `CLIPVisionModel` or `SiglipVisionModel` (embeddings, optional pre-norm, a list of blocks).
        select_layer: index into the hidden states, where 0 is the embedding and -1 the last block's output.
        select: "patch" drops the CLS token where the encoder has one, "all" keeps it.
        drop_first_token: also drop the first patch (728 of 729 SigLIP tokens in published TinyLLaVA Factory checkpoints).

    Raises:
        ValueError: the encoder is of another shape, or `select_layer` lies outside its depth.
    """

    def __init__(self, encoder: nn.Module, select_layer: int, select: str, drop_first_token: bool) -> None:
        super().__init__()
        blocks = getattr(getattr(encoder, "encoder", None), "layers", None)
        if not isinstance(blocks, nn.ModuleList) or not hasattr(encoder, "embeddings"):
            raise ValueError(
                f"{type(encoder).__name__} has no `embeddings` and `encoder.layers`; "
                "HFVisionTower reads CLIP and SigLIP encoders"
            )
        depth = len(blocks)
        num_run = select_layer if select_layer >= 0 else depth + 1 + select_layer
        if not 0 <= num_run <= depth:
            raise ValueError(f"select_layer {select_layer} lies outside the tower's hidden states 0 to {depth}")
        self.encoder = encoder
        self.depth = depth
        self.select = select
        self.drop_first_token = drop_first_token
        # A plain list hides these from parameters(), .to() and DDP: nothing downstream can train or wait for them.
        self._unused_blocks = list(blocks[num_run:])
        encoder.encoder.layers = blocks[:num_run]  # type: ignore[union-attr]

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that are run, first to last."""
        return self.encoder.encoder.layers  # type: ignore[union-attr, return-value]

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
        return hasattr(self.encoder.embeddings, "class_embedding")

    @property
    def num_tokens(self) -> int:
        """P, the tokens that come out for one image."""
        patches = (int(self.config.image_size) // int(self.config.patch_size)) ** 2
        return patches + int(self.has_cls and self.select == "all") - int(self.drop_first_token)

    @property
    def image_size(self) -> int:
        """H = W in pixels."""
        return int(self.config.image_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, H, W) to features (B, P, Dv)."""
        hidden: Tensor = self.encoder.embeddings(pixel_values)  # type: ignore[operator]
        if hasattr(self.encoder, "pre_layrnorm"):  # CLIP's own spelling
            hidden = self.encoder.pre_layrnorm(hidden)  # type: ignore[operator]
        hidden = self.encoder.encoder(inputs_embeds=hidden).last_hidden_state  # type: ignore[operator]
        skip = int(self.has_cls and self.select == "patch") + int(self.drop_first_token)
        return hidden[:, skip:]

    def whole_encoder_state(self) -> dict[str, Tensor]:
        """Return the encoder's state dict with the blocks that are not run back in their places."""
        state = dict(self.encoder.state_dict())
        first = len(self.blocks)
        for offset, block in enumerate(self._unused_blocks):
            for name, tensor in block.state_dict().items():
                state[f"encoder.layers.{first + offset}.{name}"] = tensor
        return state


def num_parameters(module: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum({id(p): p.numel() for p in module.parameters()}.values())


@torch.no_grad()
def encode_images(tower: HFVisionTower, pixel_values: Tensor) -> Tensor:
    """Run a frozen tower on (B, 3, H, W) without a graph, in the tower's own dtype, giving (B, P, Dv)."""
    parameter = next(tower.parameters())
    return tower(pixel_values.to(device=parameter.device, dtype=parameter.dtype))
