"""FLOPs that a sample asks for, by part and direction, counted from shapes (1 multiply-add = 2 FLOPs).

These are the model's own: nothing that is computed a second time counts, attention counts the pairs that see each other
(half of them where it is causal), and of a frozen weight no gradient. What makes no matrix product is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinylmm.sizing.layers import Attention, Depthwise, Linear, Part
from tinylmm.sizing.parameters import Tune, Tuned, tuned_layers

PARTS = ("vision_tower", "connector", "llm")
"""In the order in which a sample passes through them."""


@dataclass(frozen=True)
class Sample:
    """A mean sample.

    Attributes:
        tokens: positions it takes, its images counted in.
        squared: mean of the squares of that, which attention goes by.
        supervised: positions whose logits are computed.
        images: images, or tiles of them, or frames of clips.
        features: what the connector is given at a time, where that is not as many: clips.
        dense: count every pair of positions, as a kernel does that computes what a mask then hides.
    """

    tokens: float
    squared: float
    supervised: float
    images: float
    dense: bool = False
    features: float | None = None

    @classmethod
    def of_length(cls, tokens: float, supervised: float, images: float = 1.0) -> Sample:
        """A sample where all are of one length."""
        return cls(tokens, tokens**2, supervised, images)

    def pairs(self, window: int | None) -> float:
        """Pairs of positions of which one sees the other."""
        if self.dense:
            return self.squared
        if window is None or self.tokens <= window:
            return (self.squared + self.tokens) / 2
        return window * self.tokens - window * (window - 1) / 2


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample.

    Attributes:
        forward: of the forward pass.
        activations: of the backward pass, for the gradients of activations,
        weights: and for those of weights.
    """

    forward: float = 0.0
    activations: float = 0.0
    weights: float = 0.0

    @property
    def backward(self) -> float:
        """Of the whole backward pass."""
        return self.activations + self.weights

    @property
    def total(self) -> float:
        """Of both passes."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.activations + other.activations, self.weights + other.weights)

    def times(self, factor: float) -> Flops:
        """So many of them."""
        return Flops(self.forward * factor, self.activations * factor, self.weights * factor)


def sample_flops(
    parts: Mapping[str, Part], tune: Mapping[str, Tune], sample: Sample, cached: bool = False
) -> dict[str, Flops]:
    """FLOPs of one sample by part.

    Args:
        parts: the three of PARTS.
        tune: how each is trained.
        sample: a mean one.
        cached: whether the frozen tower's features are read from disk, so that it is not run.
    """
    found, flows = {}, False
    for name in PARTS:
        part, rows = parts[name], sample.tokens if parts[name].head is not None else sample.images
        rows = sample.features if name == "connector" and sample.features is not None else rows
        flops, flows = _part_flops(part, tune[name], sample, rows, flows)
        found[name] = Flops() if name == "vision_tower" and cached else flops
    return found


def first_pass_flops(parts: Mapping[str, Part], images: float) -> float:
    """FLOPs that caching the features of so many images takes, once."""
    tower = parts["vision_tower"]
    return _part_flops(tower, "frozen", Sample(0, 0, 0, images), images, False)[0].forward


def block_forward(parts: Mapping[str, Part], tune: Mapping[str, Tune], sample: Sample) -> float:
    """FLOPs of the blocks' forward pass, which gradient checkpointing takes a second time: of LLM and trained tower."""
    names = [name for name in ("vision_tower", "llm") if name == "llm" or tune[name] != "frozen"]
    inner = {name: replace(parts[name], stem=(), tail=(), head=None) for name in names}
    rows = {"llm": sample.tokens, "vision_tower": sample.images}
    return sum(_part_flops(inner[name], tune[name], sample, rows[name], False)[0].forward for name in names)


def _part_flops(part: Part, tune: Tune, sample: Sample, units: float, flows: bool) -> tuple[Flops, bool]:
    """FLOPs of `units` units of a part, and whether a gradient is asked of what comes out.

    Args:
        flows: whether one is asked of what goes in.
    """
    total, entered, read = Flops(), flows, flows
    for tuned in tuned_layers(part, tune):
        layer = tuned.layer
        rows = sample.supervised if layer is part.head else units
        if isinstance(layer, Linear):
            if not layer.shared:  # queries, keys and values read one tensor, whichever of them is trained
                read = entered if layer.source else flows
            total += _linear(tuned, layer, rows, read)
        elif isinstance(layer, Depthwise):
            each = 2.0 * layer.channels * layer.kernel * layer.rows * rows
            total += Flops(each, each if flows else 0.0, each if tuned.trained else 0.0)
        elif isinstance(layer, Attention):
            each = 4.0 * layer.width * _pairs(layer, sample, rows)
            total += Flops(each, 2 * each if flows else 0.0)
        flows = flows or bool(tuned.rank) or (tuned.trained and layer.parameters > 0)
    return total, flows


def _pairs(layer: Attention, sample: Sample, units: float) -> float:
    if layer.queries is None or layer.keys is None:
        return sample.pairs(layer.window)
    return units * layer.queries * layer.keys


def _linear(tuned: Tuned, layer: Linear, units: float, flows: bool) -> Flops:
    rows = units * layer.rows
    each = 2.0 * rows * layer.inputs * layer.outputs
    flops = Flops(each, each if flows else 0.0, each if tuned.trained else 0.0)
    if tuned.rank:
        down, up = 2.0 * rows * layer.inputs * tuned.rank, 2.0 * rows * tuned.rank * layer.outputs
        flops += Flops(down + up, up + (down if flows else 0.0), down + up)
    return flops
