"""What a part consists of, as far as its size says: layers with their weights and shapes, in the order in which they run.

Parameters, FLOPs and memory are all read from these few kinds of layers (`parameters.py`, `flops.py`, `memory.py`).
A layer is applied to `rows` vectors a unit: a unit is a token in an LLM, an image (a tile of it) in a tower or connector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class UnknownShapeError(Exception):
    """What a part looks like cannot be told from what is known of it; the message is a sentence that names the reason."""


@dataclass(frozen=True)
class Linear:
    """A matrix product with trained weights: a linear layer, or a convolution whose windows do not overlap.

    Attributes:
        name: the end of its name in the model, which an adapter's `targets` may name.
        source: whether it reads the part's own input, of which no gradient is asked where nothing before is trained.
        shared: whether the layer before it reads the same tensor, which is then kept once for both.
        adapts: whether an adapter may sit on it; none does on a convolution.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = True
    rows: int = 1
    source: bool = False
    shared: bool = False
    adapts: bool = True

    @property
    def parameters(self) -> int:
        """Of weight and bias."""
        return self.inputs * self.outputs + self.biases

    @property
    def biases(self) -> int:
        """Of the bias alone."""
        return self.outputs if self.bias else 0


@dataclass(frozen=True)
class Depthwise:
    """A convolution of each channel for itself."""

    channels: int
    kernel: int
    rows: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Of weight and bias."""
        return self.channels * self.kernel + self.biases

    @property
    def biases(self) -> int:
        """Of the bias alone."""
        return self.channels if self.bias else 0


@dataclass(frozen=True)
class Attention:
    """Scores and mixing of `heads` heads; it has no weights.

    Attributes:
        queries, keys: rows of an image that ask and are asked; None in an LLM, where a token sees those before it.
        window: how many tokens back it sees; None for all.
        capped: whether scores are capped, so that the whole table of them is kept (Gemma 2).
        turned: whether queries and keys are turned by their positions, and so kept apart from the layers that made them.
    """

    heads: int
    head_dim: int
    key_heads: int
    queries: int | None = None
    keys: int | None = None
    window: int | None = None
    capped: bool = False
    turned: bool = False
    parameters: int = 0
    biases: int = 0

    @property
    def width(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Norm:
    """Normalisation with a weight, and perhaps a bias.

    Attributes:
        fused: whether it is one kernel, as PyTorch's layer norm is; else its steps are taken one by one.
    """

    width: int
    rows: int = 1
    bias: bool = False
    fused: bool = False

    @property
    def parameters(self) -> int:
        """Of weight and bias."""
        return self.width + self.biases

    @property
    def biases(self) -> int:
        """Of the bias alone."""
        return self.width if self.bias else 0


@dataclass(frozen=True)
class Elementwise:
    """An activation, a product of two branches, a dropout or a learned scale.

    Attributes:
        kind: a key of `memory.KEPT`.
        parameters: of a learned scale.
    """

    kind: str
    width: int
    rows: int = 1
    parameters: int = 0
    biases: int = 0


@dataclass(frozen=True)
class Weights:
    """Parameters that take part in no product: embeddings, learned tokens.

    Attributes:
        reached: whether the loss depends on them; what it does not reach is never trained.
    """

    name: str
    parameters: int
    reached: bool = True
    biases: int = 0


Layer = Linear | Depthwise | Attention | Norm | Elementwise | Weights


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        stem: what runs before the blocks.
        blocks: those that are run, first to last; `tune: {from_layer: n}` counts them.
        tail: what runs behind them.
        unreached: what is held and never run, such as a tower's pooling head.
        depth: blocks that a fraction in `from_layer` is taken of; a tower's unused ones are counted in.
        width: of what comes out.
        tokens: that come out for an image; 0 for an LLM.
        pixels: of a tower: numbers of an image that goes in.
        head: of an LLM: to the vocabulary, run at supervised positions alone.
        tied: whether the head's weight is the embedding.
    """

    stem: tuple[Layer, ...]
    blocks: tuple[tuple[Layer, ...], ...]
    tail: tuple[Layer, ...]
    unreached: tuple[Layer, ...] = ()
    depth: int = 0
    width: int = 0
    tokens: int = 0
    pixels: int = 0
    head: Linear | None = None
    tied: bool = False

    def layers(self) -> Iterator[Layer]:
        """Every layer that runs, in order, without the head."""
        yield from self.stem
        for block in self.blocks:
            yield from block
        yield from self.tail


def mlp(
    inputs: int, outputs: int, depth: int, rows: int, activation: str, source: bool = True
) -> list[tuple[Layer, ...]]:
    """Linear(inputs, outputs), then depth - 1 times activation and Linear(outputs, outputs): a block each."""
    blocks: list[tuple[Layer, ...]] = [(Linear("0", inputs, outputs, rows=rows, source=source),)]
    for number in range(1, depth):
        blocks.append((Elementwise(activation, outputs, rows), Linear(str(2 * number), outputs, outputs, rows=rows)))
    return blocks
