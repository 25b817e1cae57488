"""Connectors for clips: the tokens of all its frames, one frame after the other, become a fixed number.

Both are TinyLLaVA-Video's (arXiv 2501.15513), and name their parameters as its checkpoints do. An image is a clip of one frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinylmm.models.query_connectors import PerceiverConnector


class NaiveResamplerConnector(PerceiverConnector):
    """All tokens of a clip at once, told apart by a sinusoidal position each (v1 of the paper; `naiveresampler.py`).

    Args:
        num_queries: latents, output tokens a clip.
        depth: blocks.
        heads, head_dim: of the attention; its inner width is their product.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 512,
        depth: int = 3,
        heads: int = 8,
        head_dim: int = 64,
        init: str = "normal",
    ) -> None:
        super().__init__(vision_dim, llm_dim, num_queries, depth, heads, head_dim, init)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T * P, Dv) to (B, Q, Dl)."""
        media = self.linear(features)
        return self.resample(media + positions(media))


class GroupResamplerConnector(PerceiverConnector):
    """A clip's tokens in consecutive groups, each through the same resampler with the same latents (v2; `groupresampler.py`).

    Where the groups do not divide the tokens, the first ones have one more. Positions are added to the output.

    Args:
        num_queries: output tokens a clip, over all groups.
        groups: of consecutive tokens; each gives num_queries / groups tokens.
        depth: blocks.
        heads, head_dim: of the attention; its inner width is their product.

    Raises:
        ValueError: `groups` does not divide `num_queries`.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 512,
        groups: int = 16,
        depth: int = 3,
        heads: int = 8,
        head_dim: int = 64,
        init: str = "normal",
    ) -> None:
        if groups < 1 or num_queries % groups:
            raise ValueError(
                f"connector.options.num_queries is {num_queries}, which {groups} groups do not divide; change one of them"
            )
        super().__init__(vision_dim, llm_dim, num_queries // groups, depth, heads, head_dim, init)
        self.num_queries = num_queries
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        """(B, T * P, Dv) to (B, Q, Dl)."""
        media = self.linear(features)
        length, longer = divmod(media.shape[1], self.groups)
        parts = media.split([longer * (length + 1), (self.groups - longer) * length], dim=1)
        counts = (longer, self.groups - longer)
        # Groups of one length go through the attention as one batch.
        answers = [self._grouped(part, count) for part, count in zip(parts, counts, strict=True) if count]
        output = torch.cat(answers, dim=1)
        return output + positions(output)

    def _grouped(self, media: Tensor, groups: int) -> Tensor:
        """Equal groups (B, G * P, Dl) to (B, G * Q, Dl)."""
        grouped = media.unflatten(1, (groups, media.shape[1] // groups)).flatten(0, 1)
        return self.resample(grouped).unflatten(0, (media.shape[0], groups)).flatten(1, 2)


def positions(tokens: Tensor) -> Tensor:
    """Sinusoidal positions (P, D) of tokens (B, P, D), rounded to 16 bits as TinyLLaVA-Video keeps them, whatever the dtype."""
    length, width = tokens.shape[1:]
    columns = torch.arange(0, width, 2, device=tokens.device).float()
    angles = torch.arange(length, device=tokens.device).float()[:, None] * torch.exp(
        columns * -(math.log(10000.0) / width)
    )
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return table.to(torch.float16).to(tokens.dtype)
