"""How many heads and how wide a feed-forward each layer of OpenELM has (arXiv 2404.14619, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def make_divisible(value: float, divisor: int) -> int:
    """Round to the nearest multiple of `divisor`, never to 0 and never down by more than a tenth (MobileNet's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def per_layer(multipliers: float | Sequence[float], layers: int, what: str) -> list[float]:
    """Return one multiplier a layer: a number is the same for all, two are the ends of a line, rounded to 0.01.

    Raises:
        ValueError: there are neither one, nor two, nor `layers` of them.
    """
    if isinstance(multipliers, int | float):
        return [float(multipliers)] * layers
    values = [float(value) for value in multipliers]
    if len(values) == layers:
        return values
    if len(values) != 2:
        raise ValueError(
            f"{what} has {len(values)} numbers; give one, the first and the last, or one for each of {layers} layers"
        )
    step = (values[1] - values[0]) / max(1, layers - 1)
    return [round(values[0] + step * layer, 2) for layer in range(layers)]


def query_heads(config: Mapping[str, Any]) -> list[int]:
    """Query heads of each layer, from the fields of a config.json."""
    depth, dim, group = (int(config[key]) for key in ("num_transformer_layers", "head_dim", "num_gqa_groups"))
    multipliers = per_layer(config["qkv_multipliers"], depth, "qkv_multipliers")
    return [make_divisible(int(config["model_dim"]) * value, dim * group) // dim for value in multipliers]


def ffn_widths(config: Mapping[str, Any]) -> list[int]:
    """Width between the two projections of each layer's feed-forward part, from the fields of a config.json."""
    depth, divisor = int(config["num_transformer_layers"]), int(config["ffn_dim_divisor"])
    multipliers = per_layer(config["ffn_multipliers"], depth, "ffn_multipliers")
    return [make_divisible(value * int(config["model_dim"]), divisor) for value in multipliers]
