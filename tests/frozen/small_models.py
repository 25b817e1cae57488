"""Words for small random models: between them every connector, and every class of tower and LLM that is tinylmm's own."""

from __future__ import annotations

LLAMA = [
    *["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"],
    *["num_key_value_heads=2", "vocab_size=320", "max_position_embeddings=256"],
]
LLM = {
    "tinyllama": LLAMA,
    "phi2": [*LLAMA, "num_key_value_heads=4", "bos_token_id=1", "eos_token_id=2"],
    "gemma": [*LLAMA, "num_key_value_heads=1", "head_dim=8"],
    "openelm_270m": [
        *["model_dim=32", "num_transformer_layers=2", "head_dim=8", "num_gqa_groups=2", "ffn_dim_divisor=16"],
        *["vocab_size=320", "max_context_length=256"],
    ],
}
VISION = ["hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "image_size=16", "patch_size=4"]
WIDE = [*VISION, "intermediate_size=48"]
TOWER = {
    "clip": WIDE,
    "siglip": WIDE,
    "dinov2": VISION,
    "dinov3": WIDE,
    "mof": [*(f"clip.{word}" for word in WIDE), *(f"dinov2.{word}" for word in VISION)],
}


def words(llm: str, tower: str, connector: str, *options: str) -> list[str]:
    """The run that trains the small model of these parts."""
    found = [f"llm={llm}", f"vt={tower}", f"connector={connector}", "eval=none", "data=llava_v1_5"]
    found += ["llm.init=random", "vt.init=random", "vt.image.size=16"]
    found += [f"llm.architecture.{word}" for word in LLM[llm]]
    found += [f"vt.architecture.{word}" for word in TOWER[tower] if tower != "dinov3" or "image_size" not in word]
    return [*found, *options]


QUERIES = ("connector.options.num_queries=3", "connector.options.heads=2")
SMALL_MODELS: dict[str, list[str]] = {
    "mlp": words("tinyllama", "siglip", "mlp"),
    "mlp on tiles": words("tinyllama", "clip", "mlp", "vt.image.mode=anyres", "vt.image.tiles=[[1,2],[2,2]]"),
    "mof_mlp": words("openelm_270m", "mof", "mof_mlp", "vt.options.reference=true"),
    "linear": words("gemma", "dinov2", "linear"),
    "identity": words("phi2", "dinov3", "identity"),
    "avgpool_mlp": words("tinyllama", "siglip", "avgpool_mlp"),
    "ldp": words("tinyllama", "siglip", "ldp"),
    "ldp_v2": words("tinyllama", "clip", "ldp_v2", "vt.select_layer=-1", "vt.drop_first_token=false"),
    "pixel_shuffle_mlp": words("openelm_270m", "siglip", "pixel_shuffle_mlp"),
    "qformer": words(
        *["tinyllama", "siglip", "qformer"], *QUERIES, "connector.options.hidden_size=16", "connector.options.layers=2"
    ),
    "resampler": words(
        *["tinyllama", "siglip", "resampler"], *QUERIES, "connector.options.head_dim=8", "connector.options.depth=1"
    ),
    "resampler_bench": words(
        *["tinyllama", "siglip", "resampler_bench"],
        *QUERIES,
        *["connector.options.hidden_size=16", "connector.options.depth=1", "vt.drop_first_token=true"],
    ),
    "naive_resampler": words(
        *["tinyllama", "siglip", "naive_resampler"],
        *QUERIES,
        *["connector.options.head_dim=8", "connector.options.depth=1"],
    ),
    "group_resampler": words(
        *["tinyllama", "siglip", "group_resampler", *QUERIES, "connector.options.groups=3"],
        *["connector.options.head_dim=8", "connector.options.depth=1"],
    ),
}
