"""Connectors that ask the tower's features with learned queries: Q is the number of queries, whatever P is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinylmm.models.connectors import INIT_STD, Connector


class _QueryConnector(Connector):
    """Base: a fixed number of output tokens."""

    def __init__(self, vision_dim: int, llm_dim: int, num_queries: int, init: str) -> None:
        if num_queries < 1:
            raise ValueError(f"connector.options.num_queries is {num_queries}; at least 1 token an image is needed")
        super().__init__(vision_dim, llm_dim, init)
        self.num_queries = num_queries

    def num_tokens(self, tower_tokens: int) -> int:
        """Q, the number of queries."""
        return self.num_queries


class QFormerConnector(_QueryConnector):
    """BLIP-2's querying transformer in BERT-base's shape, then a linear layer (TinyLLaVA Factory `connector/qformer.py`).

    Randomly initialised, as there: neither BERT's nor BLIP-2's weights are loaded. Unlike there, the layer norm of the
    queries has a weight and a bias, which start as one and zero and so change nothing at first: it is transformers' own
    Q-Former.

    Args:
        num_queries: output tokens an image.
        hidden_size, layers, heads: of the Q-Former; the feed-forward is four times as wide.
        cross_attention_every: blocks 0, n, 2n, ... look at the image.
        dropout: in attention and behind each linear layer, while training.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 128,
        hidden_size: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_attention_every: int = 2,
        dropout: float = 0.1,
        init: str = "normal",
    ) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        _check_heads(hidden_size, heads)
        super().__init__(vision_dim, llm_dim, num_queries, init)
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=cross_attention_every,
            encoder_hidden_size=vision_dim,
        )
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, hidden_size) * INIT_STD)
        self.qformer = Blip2QFormerModel(config)
        self.projector = nn.Linear(hidden_size, llm_dim)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, Q, Dl)."""
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        answers = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.projector(answers)


class PerceiverConnector(_QueryConnector):
    """Flamingo's Perceiver resampler in the LLM's width (arXiv 2204.14198, appendix A.1.1; Factory `resampler.py`).

    Latents start from N(0, 1). Each block: latents attend to image and latents together, then a feed-forward, both with
    a norm in front and a residual; no biases. Parameters are named as in the Factory's checkpoints.

    Args:
        num_queries: latents, output tokens an image.
        depth: blocks.
        heads, head_dim: of the attention; its inner width is their product.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 128,
        depth: int = 3,
        heads: int = 8,
        head_dim: int = 64,
        init: str = "normal",
    ) -> None:
        super().__init__(vision_dim, llm_dim, num_queries, init)
        self.latents = nn.Parameter(torch.randn(num_queries, llm_dim))
        self.linear = nn.Linear(vision_dim, llm_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([_PerceiverAttention(llm_dim, heads, head_dim), _feed_forward(llm_dim)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(llm_dim)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, Q, Dl)."""
        return self.resample(self.linear(features))

    def resample(self, media: Tensor, shown: Tensor | None = None) -> Tensor:
        """Features in the LLM's width (B, P, Dl) to as many tokens as there are latents.

        Args:
            shown: (B, P) bool, which features are there; by default all.
        """
        latents = self.latents.to(media.dtype).expand(media.shape[0], -1, -1)
        for block in self.layers:
            attention, feed_forward = cast(nn.ModuleList, block)
            latents = latents + attention(media, latents, shown)
            latents = latents + feed_forward(latents)
        return self.norm(latents)


class BenchResamplerConnector(_QueryConnector):
    """The resampler of paper 1's ablation (arXiv 2402.14289, figure 6; TinyLLaVABench `multimodal_projector/builder.py`).

    It works in a width of its own: queries attend to the image alone, and a bias-free linear layer leads to the LLM's
    width at the end. Queries start from N(0, 1). Parameters are named as in TinyLLaVABench's checkpoints.

    Args:
        num_queries: output tokens an image.
        hidden_size, depth, heads: of the resampler.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 128,
        hidden_size: int = 768,
        depth: int = 3,
        heads: int = 12,
        init: str = "torch",
    ) -> None:
        _check_heads(hidden_size, heads)
        super().__init__(vision_dim, llm_dim, num_queries, init)
        self.resampler_blocks = nn.ModuleList(_BenchBlock(hidden_size, vision_dim, heads) for _ in range(depth))
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size))
        self.post_norm = nn.LayerNorm(hidden_size)
        self.final_proj = nn.Linear(hidden_size, llm_dim, bias=False)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, Q, Dl)."""
        queries = self.queries.to(features.dtype).expand(features.shape[0], -1, -1)
        for block in self.resampler_blocks:
            queries = block(queries, features)
        return self.final_proj(self.post_norm(queries))


class _PerceiverAttention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, image: Tensor, latents: Tensor, shown: Tensor | None = None) -> Tensor:
        """Image (B, P, D), of which `shown` (B, P) is there, and latents (B, Q, D) to (B, Q, D)."""
        if shown is not None:
            shown = functional.pad(shown, (0, latents.shape[1]), value=True)[:, None, None]  # (B, 1, 1, P + Q)
        latents = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(image), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(latents), keys, values, self.heads, shown))


class _BenchBlock(nn.Module):
    def __init__(self, dim: int, image_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(image_dim, dim, bias=False)
        self.to_v = nn.Linear(image_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.feed_forward = _feed_forward(dim)
        self.norm_image = nn.LayerNorm(image_dim)
        self.norm_hidden = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Queries (B, Q, D) and image (B, P, Dv) to (B, Q, D)."""
        image = self.norm_image(image)
        asked = self.to_q(self.norm_hidden(queries))
        queries = queries + self.to_out(_attend(asked, self.to_k(image), self.to_v(image), self.heads))
        return queries + self.feed_forward(queries)


def _feed_forward(dim: int, mult: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, mult * dim, bias=False), nn.GELU(), nn.Linear(mult * dim, dim, bias=False)
    )


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention over `heads`: (B, Q, D), (B, K, D), (B, K, D) to (B, Q, D), scaled by the square root of D / heads.

    `mask` is (B, 1, 1, K) bool: which keys are there.
    """
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (queries, keys, values))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _check_heads(hidden_size: int, heads: int) -> None:
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"connector.options.hidden_size is {hidden_size}, which {heads} heads do not divide; change one of them"
        )
