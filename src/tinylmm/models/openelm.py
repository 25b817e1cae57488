"""OpenELM (Apple, arXiv 2404.14619) as a transformers-style causal LM: transformers itself has none.

Every block has its own number of heads and its own feed-forward width ("layer-wise scaling"); keys and values are shared
by groups of heads, queries and keys are normalised a head at a time, and the head is the embedding table.
Importing this module registers it with transformers' AutoConfig and AutoModelForCausalLM; nothing else treats it apart.
Tensors are named as in Apple's released safetensors (`transformer.layers.0.attn.qkv_proj.weight`), which load as they are.

Shapes: B rows, L new tokens, T tokens seen so far and new, D width, H and K query and key heads of a block, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from tinylmm.models.openelm_config import OpenELMConfig

NORM_EPS = 1e-6
"""Not part of OpenELM's config: a constant of its RMSNorm."""


class OpenELMRMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)).to(hidden.dtype) * self.weight


def rotary_angles(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (B, 1, L, E) in fp32 for positions (B, L), to be used by `rotate`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[:, None, :, None] * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (B, H, L, E) by its positions: component i and i + E/2 are a pair; fp32 in between."""
    cos, sin = angles
    first, second = heads.float().chunk(2, dim=-1)
    return heads.float() * cos + torch.cat((-second, first), dim=-1) * sin


class OpenELMAttention(nn.Module):
    """Causal self-attention with a layer's own number of heads."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.head_dim = config.head_dim
        self.heads = config.num_query_heads[layer]
        self.kv_heads = config.num_kv_heads[layer]
        self.num_key_value_groups = config.num_gqa_groups  # read by transformers' attention functions
        self.scaling = config.head_dim**-0.5
        self.qkv_proj = nn.Linear(config.model_dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.q_norm = OpenELMRMSNorm(self.head_dim) if config.normalize_qk_projections else None
        self.k_norm = OpenELMRMSNorm(self.head_dim) if config.normalize_qk_projections else None
        self.out_proj = nn.Linear(self.heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D); the mask is what `create_causal_mask` made for the attention implementation."""
        batch, length, _ = hidden.shape
        qkv = self.qkv_proj(hidden).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, angles).to(value.dtype), rotate(key, angles).to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        result: Tensor = self.out_proj(mixed.reshape(batch, length, -1))
        return result


class OpenELMFeedForward(nn.Module):
    """Two projections with a layer's own width between them, gated or not."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        width = config.ffn_width(layer)
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * width if self.gated else width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        inner = self.proj_1(hidden)
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self.act(gate) * inner
        else:
            inner = self.act(inner)
        result: Tensor = self.proj_2(inner)
        return result


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and beside a residual connection."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFeedForward(config, layer)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim)
        self.attn_norm = OpenELMRMSNorm(config.model_dim)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D); the keyword arguments are the attention's."""
        hidden = hidden + self.attn(self.attn_norm(hidden), **kwargs)
        result: Tensor = hidden + self.ffn(self.ffn_norm(hidden))
        return result


class OpenELMPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of every OpenELM class."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class OpenELMModel(OpenELMPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMDecoderLayer(config, layer) for layer in range(config.num_transformer_layers)
        )
        self.norm = OpenELMRMSNorm(config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states (B, L, D).

        Args:
            input_ids: (B, L) int64, or
            inputs_embeds: (B, L, D).
            attention_mask: (B, T) with 0 at padding.
            position_ids: (B, L) int64. Without mask and cache, attention never crosses a place where they restart.
            past_key_values: keys and values of the T - L tokens before.
            use_cache: keep keys and values for the next call; the config's own by default.
            kwargs: handed to the attention function.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.token_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # blocks are run twice, and would add their keys twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (seen + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_freq_constant)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(
                hidden,
                angles=angles,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """OpenELM with its head: the embedding table, or a matrix of its own."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head: nn.Module = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.transformer.token_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, L, V), of the last `logits_to_keep` positions where that is not 0.

        Args:
            labels: (B, L) int64, not shifted, -100 without loss; the loss is then the mean over the rest.
            logits_to_keep: a number of positions from the end, or their indices.

        The other arguments are those of `OpenELMModel.forward`.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = output.last_hidden_state
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)


AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
