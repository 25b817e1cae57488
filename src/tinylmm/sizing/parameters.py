"""How many parameters a part has, and how many of them a stage trains. Exact: tests count those of the built models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinylmm.sizing.layers import Layer, Linear, Part, Weights

Tune = str | Mapping[str, Any]
"""`frozen`, `full`, or a mapping with one of from_layer, lora and qlora, as `config/recipe.py` has it."""


@dataclass(frozen=True)
class Tuned:
    """A layer, whether its own weights are trained, the rank of the adapter on it (0 for none), and if that drops inputs."""

    layer: Layer
    trained: bool
    rank: int = 0
    dropout: bool = False


def adapter_of(tune: Tune) -> Mapping[str, Any] | None:
    """The settings of the adapters that a part gets, or None."""
    if isinstance(tune, str):
        return None
    return tune.get("lora") or tune.get("qlora")


def tuned_layers(part: Part, tune: Tune) -> Iterator[Tuned]:
    """Every layer that runs, in order, with how it is trained; the LLM's head comes last."""
    adapter = adapter_of(tune)
    first = None if isinstance(tune, str) else tune.get("from_layer")
    if isinstance(first, float):
        first = int(first * part.depth)
    full = tune == "full"
    for layer in part.stem:
        yield _tuned(layer, full, adapter)
    for number, block in enumerate(part.blocks):
        for layer in block:
            yield _tuned(layer, full or (first is not None and number >= first), adapter)
    for layer in part.tail:
        yield _tuned(layer, full, adapter)
    if part.head is not None:
        yield Tuned(part.head, full)


def _tuned(layer: Layer, trained: bool, adapter: Mapping[str, Any] | None) -> Tuned:
    if adapter is None or not isinstance(layer, Linear) or not layer.adapts:
        return Tuned(layer, trained and not (isinstance(layer, Weights) and not layer.reached))
    targets = adapter.get("targets", "all-linear")
    wanted = targets == "all-linear" or layer.name in [end.rpartition(".")[2] for end in targets]
    if not wanted:
        return Tuned(layer, trained)
    return Tuned(layer, trained, int(adapter.get("r", 128)), float(adapter.get("dropout", 0.05)) > 0)


def total_parameters(part: Part) -> int:
    """All that a part holds in memory, a tied head once."""
    head = 0
    if part.head is not None:
        head = part.head.biases if part.tied else part.head.parameters
    return sum(layer.parameters for layer in (*part.layers(), *part.unreached)) + head


def trained_parameters(part: Part, tune: Tune) -> int:
    """Those that a stage trains, adapters counted in."""
    adapter = adapter_of(tune)
    bias = str(adapter.get("bias", "none")) if adapter is not None else "none"
    total = 0
    for tuned in tuned_layers(part, tune):
        layer = tuned.layer
        if tuned.trained:
            total += layer.biases if layer is part.head and part.tied else layer.parameters
        elif isinstance(layer, Linear) and tuned.rank:
            total += tuned.rank * (layer.inputs + layer.outputs)
        if bias == "all" or (bias == "lora_only" and tuned.rank):
            total += layer.biases
    return total
