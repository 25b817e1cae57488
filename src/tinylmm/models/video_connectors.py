"""Connectors for clips: the tokens of all its frames, one frame after the other, become a fixed number.

Both are TinyLLaVA-Video's (arXiv 2501.15513), and name their parameters as its checkpoints do. An image is a clip of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinylmm.models.query_connectors import PerceiverConnector


class NaiveResamplerConnector(PerceiverConnector):
    """All tokens of a clip at once, told apart by a sinusoidal position each (v1 of the paper; `naiveresampler.py`).

    Args:
        num_queries: latents, output tokens a clip.
        depth: blocks.
        heads, head_dim: of the attention; its inner width is their product.
    """

    takes_clips = True

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

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T * P, Dv) to (B, Q, Dl); `lengths` (B,) are those of clips that are padded to the longest one."""
        media = self.linear(features)
        shown = None if lengths is None else torch.arange(media.shape[1], device=media.device) < lengths[:, None]
        return self.resample(media + positions(media), shown)


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

    takes_clips = True

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

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T * P, Dv) to (B, Q, Dl); `lengths` (B,) are those of clips that are padded to the longest one."""
        grouped, shown = self._grouped(self.linear(features), lengths)
        output = self.resample(grouped, shown).unflatten(0, (len(features), self.groups)).flatten(1, 2)
        return output + positions(output)

    def _grouped(self, media: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, Dl) in their groups, (B * G, C, Dl), and which of these are there where groups differ in length.

        All groups go through the attention as one batch, so that ranks with other clips run the same modules.
        """
        count, length = media.shape[:2]
        if lengths is None and length % self.groups == 0:
            return media.unflatten(1, (self.groups, -1)).flatten(0, 1), None
        if lengths is None:
            lengths = torch.full((count,), length, device=media.device)
        number = torch.arange(self.groups, device=media.device)
        sizes = lengths[:, None] // self.groups + (number < lengths[:, None] % self.groups)  # (B, G)
        places = torch.arange(-(-length // self.groups), device=media.device)
        index = ((sizes.cumsum(1) - sizes)[..., None] + places).clamp(max=length - 1)  # (B, G, C)
        shown = places < sizes[..., None]
        clips = torch.arange(count, device=media.device)[:, None, None]
        return media[clips, index].flatten(0, 1), shown.flatten(0, 1)


def joined(features: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Frames of several clips (V, P, Dv) as clips (B, T * P, Dv), padded where they differ, and then their lengths (B,).

    Args:
        frames: how many each clip has; V in all.
    """
    if len(set(frames)) == 1:
        return features.unflatten(0, (len(frames), frames[0])).flatten(1, 2), None
    clips = [clip.flatten(0, 1) for clip in features.split(list(frames))]
    lengths = torch.tensor([len(clip) for clip in clips], device=features.device)
    return pad_sequence(clips, batch_first=True), lengths


def positions(tokens: Tensor) -> Tensor:
    """Sinusoidal positions (P, D) of tokens (B, P, D), rounded to 16 bits as TinyLLaVA-Video keeps them, whatever the dtype."""
    length, width = tokens.shape[1:]
    columns = torch.arange(0, width, 2, device=tokens.device).float()
    angles = torch.arange(length, device=tokens.device).float()[:, None] * torch.exp(
        columns * -(math.log(10000.0) / width)
    )
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return table.to(torch.float16).to(tokens.dtype)
