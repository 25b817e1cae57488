"""OpenELM's configuration: Apple's fields, and what they make of each layer (arXiv 2404.14619, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from tinylmm.sizing.openelm import make_divisible, per_layer


class OpenELMConfig(PreTrainedConfig):
    """Fields of Apple's config.json, under Apple's names.

    Args:
        qkv_multipliers: width of a layer's queries / `model_dim`: for all layers, or of the first and last one.
        num_gqa_groups: query heads that share one key head.
        ffn_multipliers: feed-forward width / `model_dim`: for all layers, of the first and last one, or of each.
        ffn_dim_divisor: feed-forward widths are multiples of it.
        rope_max_length: kept for Apple's config.json alone; rotary angles are computed for any position.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 12,
        model_dim: int = 2048,
        head_dim: int = 128,
        qkv_multipliers: float | Sequence[float] = 1.0,
        num_gqa_groups: int = 1,
        ffn_multipliers: float | Sequence[float] = 4.0,
        ffn_with_glu: bool = True,
        ffn_dim_divisor: int = 256,
        activation_fn_name: str = "swish",
        normalize_qk_projections: bool = False,
        share_input_output_layers: bool = False,
        rope_freq_constant: float = 10000,
        rope_max_length: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs: Any,
    ) -> None:
        """Derive heads and feed-forward widths of every layer.

        Raises:
            ValueError: the multipliers do not fit the layers, or a checkpoint's own lists of heads contradict them.
        """
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.qkv_multipliers = qkv_multipliers
        self.num_gqa_groups = num_gqa_groups
        self.ffn_with_glu = ffn_with_glu
        self.ffn_dim_divisor = ffn_dim_divisor
        self.activation_fn_name = activation_fn_name
        self.normalization_layer_name = kwargs.pop("normalization_layer_name", "rms_norm")
        if self.normalization_layer_name != "rms_norm":
            raise ValueError(
                f"normalization_layer_name is {self.normalization_layer_name!r}; OpenELM has rms_norm only"
            )
        self.normalize_qk_projections = normalize_qk_projections
        self.share_input_output_layers = share_input_output_layers
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._set_layers(qkv_multipliers, ffn_multipliers, kwargs.pop("num_query_heads", None))
        for derived in ("num_kv_heads", "tie_word_embeddings", "auto_map"):  # auto_map names Apple's code; we run none
            kwargs.pop(derived, None)
        super().__init__(
            tie_word_embeddings=share_input_output_layers,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def _set_layers(
        self, qkv_multipliers: float | Sequence[float], ffn_multipliers: float | Sequence[float], given_heads: Any
    ) -> None:
        """Derive what differs from layer to layer; `given_heads` is a checkpoint's own list of query heads, if any."""
        depth, group = self.num_transformer_layers, self.num_gqa_groups
        qkv = per_layer(qkv_multipliers, depth, "qkv_multipliers")
        heads = [make_divisible(self.model_dim * value, self.head_dim * group) // self.head_dim for value in qkv]
        if isinstance(given_heads, list) and given_heads != heads:
            raise ValueError(f"num_query_heads is {given_heads}, but qkv_multipliers {qkv_multipliers} give {heads}")
        self.num_query_heads = heads
        self.num_kv_heads = [count // group for count in heads]
        self.ffn_multipliers = per_layer(ffn_multipliers, depth, "ffn_multipliers")

    def ffn_width(self, layer: int) -> int:
        """Return the width between the two projections of a layer's feed-forward part."""
        return make_divisible(self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor)
