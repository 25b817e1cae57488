"""Memory that a training step takes on one device, by term, from the layers of the parts.

What a layer keeps for the backward pass is what PyTorch's autograd keeps of it: a linear layer its input where its weight is
trained, a norm its input, an activation its operands. `benchmarks/planner.py` holds the sum against measured peaks on a CPU.
How a card holds and shares out weights, gradients and optimiser is arithmetic on what torch and DeepSpeed document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from tinylmm.sizing.flops import PARTS
from tinylmm.sizing.layers import Attention, Depthwise, Elementwise, Layer, Linear, Norm, Part
from tinylmm.sizing.parameters import Tune, Tuned, adapter_of, total_parameters, trained_parameters, tuned_layers

GIB = 2**30
KEPT = {
    "gelu": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "gelu_pytorch_tanh": 1,
    "silu": 1,
    "relu": 0,
    "hardswish": 1,
    "quick_gelu": 2,
    "product": 2,
    "scale": 1,
}
"""Kind of an elementwise layer -> tensors of its width that it keeps, in the type that the model computes in.

Phi's GELU is one kernel by then (`models/fused.py`)."""
CAPPED = 8.0
"""Bytes of a score that is capped: behind its cap and, twice in bf16, behind the softmax."""
LOSS = 12
"""Bytes of a logit at the peak of the loss: its log-probability, and two gradients, all in fp32."""
CHUNK = 128 * 2**20
"""Bytes of the fp32 logits that exist at once (`models/fused_loss.py`)."""
WORKING = 3.0
"""Tensors of a block's widest layer that its backward pass has at once, beside what was kept."""
CONTEXT = 1.0 * GIB
"""Of the CUDA context and the libraries' own buffers: assumed."""
FRAGMENTED = 0.1
"""Of what comes and goes in a step (gradients, activations, logits), held in pieces that fit nothing: assumed."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket, by its own default,"""
LIVE = 1_000_000_000
"""and parameters that ZeRO-3 keeps gathered at most."""
QUANTIZED = {(4, True): 0.516, (4, False): 0.5625, (8, True): 1.0, (8, False): 1.0}
"""Bytes a weight of (bits, doubly quantised), with its scales (QLoRA, arXiv 2305.14314, section 3)."""

FP8_MULTIPLE = 16
"""What both sides of a matrix in eight-bit floats are multiples of (`models/fp8.py`)."""

PREPACKED_FROM = 2**18
"""Numbers of a frozen linear layer's weight from which a CPU is given copies that its kernels read as they lie,"""
PREPACKED_AT_MOST = 2 * GIB
"""and bytes that the copies of a part's layers take at most, two of each counted (`models/prepacked.py`)."""


@dataclass(frozen=True)
class Placement:
    """How a stage lies on its devices.

    Attributes:
        sharding: local, ddp, zero2 or zero3.
        ranks: devices.
        compute_bytes: 2 in bf16 and fp16, 4 in fp32.
        on_gpu: a CPU holds frozen weights in fp32 too, and knows no CUDA context.
        checkpointing: activations are computed again in the backward pass.
        accumulates: several micro-batches make a step, so that gradients are there in each forward pass but the first.
        optimizer_bytes: state of the optimiser for a trained parameter.
        compiled: blocks are compiled: norms, casts and products of gates are computed again of what is kept anyway.
        eight_bits: the frozen LLM's linear layers are held in eight bits (`models/fp8.py`).
    """

    sharding: str = "local"
    ranks: int = 1
    compute_bytes: int = 2
    on_gpu: bool = True
    checkpointing: bool = False
    accumulates: bool = True
    optimizer_bytes: float = 8.0
    compiled: bool = False
    eight_bits: bool = False

    @property
    def narrow_stream(self) -> bool:
        """Whether what goes from block to block is held in half precision (`LMM.residual_type`)."""
        return self.on_gpu and self.compute_bytes < 4


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        tokens: positions of all rows, padding counted in.
        row: positions of one row.
        supervised: positions with a logit.
        images: images, or tiles of them, that the tower sees; 0 where its features are cached.
        features: that the connector sees.
        pixels: numbers of an image.
        masked: whether attention is given a mask, as SDPA is for rows that samples share.
    """

    tokens: float
    row: float
    supervised: float
    images: float
    features: float
    pixels: int = 0
    masked: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by term."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    caches: float
    fragmentation: float

    @property
    def total(self) -> float:
        """Of all terms."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(parts: Mapping[str, Part], tune: Mapping[str, Tune], batch: MicroBatch, placed: Placement) -> Memory:
    """Memory of one device at the peak of a training step.

    Where a step is one micro-batch, gradients grow while activations go: the larger of the two counts.
    """
    trained = sum(trained_parameters(parts[name], tune[name]) for name in PARTS)
    whole = {name: _held(parts[name], tune[name], placed) for name in PARTS}
    if placed.eight_bits:
        linears = [layer for layer in parts["llm"].layers() if isinstance(layer, Linear) and layer.adapts]
        eight = sum(
            layer.inputs * layer.outputs
            for layer in linears
            if not (layer.inputs % FP8_MULTIPLE or layer.outputs % FP8_MULTIPLE)
        )
        whole["llm"] -= eight * ((placed.compute_bytes if placed.on_gpu else 4) - 1.0)
    weights, caches = sum(whole.values()), 0.0
    gradients, optimizer = 4.0 * trained, placed.optimizer_bytes * trained
    if placed.sharding.startswith("zero"):
        share = 1.0 / placed.ranks
        bucket = min(trained, BUCKET) * placed.compute_bytes * 2
        weights += 4.0 * trained * share  # the fp32 copy that the optimiser steps
        if placed.sharding == "zero3":
            live = min(sum(map(total_parameters, parts.values())), LIVE) * placed.compute_bytes
            weights, caches = weights - (1 - share) * sum(whole.values()), live
        gradients, optimizer = gradients * share + bucket, optimizer * share
    elif placed.compute_bytes < 4 and placed.on_gpu:
        caches = placed.compute_bytes * trained  # autocast's copies, which the backward pass reads
    if placed.sharding == "ddp":
        gradients *= 2  # and the buckets that ranks exchange
    caches += batch.images * batch.pixels * 4.0 + _prepacked(parts, tune, placed)
    kept, working = _kept(parts, tune, batch, placed)
    activations = kept + working
    logits = min(batch.supervised, _chunk_positions(parts["llm"])) * _logit_bytes(parts["llm"], placed)
    if not placed.accumulates and not placed.sharding.startswith("zero"):
        if activations + logits > gradients + working:  # the last gradient comes when the last activation is gone
            gradients = 0.0
        else:
            activations, logits = working, 0.0
    passing = gradients + activations + logits
    fragmentation = FRAGMENTED * passing + CONTEXT if placed.on_gpu else 0.0
    return Memory(weights, gradients, optimizer, activations, logits, caches, fragmentation)


def _held(part: Part, tune: Tune, placed: Placement) -> float:
    """Bytes of a part's own weights on a device that holds all of them."""
    total, trained, adapter = total_parameters(part), trained_parameters(part, tune), adapter_of(tune)
    sharded = placed.sharding.startswith("zero")
    narrow = float(placed.compute_bytes if placed.on_gpu or sharded else 4)
    own = narrow if sharded else 4.0
    if adapter is None:
        return total * (narrow if tune == "frozen" else own)
    quantized = 0.0
    if isinstance(tune, Mapping) and tune.get("qlora"):
        bits, double = int(adapter.get("bits", 4)), bool(adapter.get("double_quant", True))
        held = sum(t.layer.parameters - t.layer.biases for t in tuned_layers(part, tune) if t.rank)
        quantized, total = held * QUANTIZED[bits, double], total - held
    return quantized + total * narrow + own * trained


def _prepacked(parts: Mapping[str, Part], tune: Mapping[str, Tune], placed: Placement) -> float:
    """Bytes of frozen layers' copies: one for the forward pass, and one for the backward pass where gradients come by."""
    if placed.on_gpu or placed.compute_bytes < 4 or placed.sharding == "zero3":
        return 0.0
    total, flows = 0.0, False
    for name in PARTS:
        how, room = tune[name], float(PREPACKED_AT_MOST if name != "connector" else 0)
        quantized = isinstance(how, Mapping) and bool(how.get("qlora"))
        for tuned in tuned_layers(parts[name], how):
            layer = tuned.layer
            plain = isinstance(layer, Linear) and layer.adapts and not tuned.trained and not (quantized and tuned.rank)
            if isinstance(layer, Linear) and plain and layer.inputs * layer.outputs >= PREPACKED_FROM:
                copy = 4.0 * layer.inputs * layer.outputs
                room -= 2 * copy
                total += copy * (1 + flows) if room >= 0 else 0.0
            flows = flows or bool(tuned.rank) or (tuned.trained and layer.parameters > 0)
    return total


def _chunk_positions(llm: Part) -> float:
    return max(1.0, CHUNK / (4.0 * llm.head.outputs)) if llm.head is not None else 0.0


def _logit_bytes(llm: Part, placed: Placement) -> float:
    if llm.head is None:
        return 0.0
    narrow = placed.compute_bytes if placed.compute_bytes < 4 else 0
    return llm.head.outputs * float(LOSS + narrow) + llm.width * placed.compute_bytes


def _kept(
    parts: Mapping[str, Part], tune: Mapping[str, Tune], batch: MicroBatch, placed: Placement
) -> tuple[float, float]:
    """Bytes kept for the backward pass, and those that it works with in its widest block."""
    kept, working, flows = 0.0, 0.0, False
    units = {"vision_tower": batch.images, "connector": batch.features, "llm": batch.tokens}
    for name in PARTS:
        found = _part_kept(parts[name], tune[name], batch, units[name], placed, flows)
        kept, flows = kept + found.kept, found.flows
        working = max(working, found.working)
    return kept, working


def kept_bytes(parts: Mapping[str, Part], tune: Mapping[str, Tune], batch: MicroBatch, placed: Placement) -> float:
    """Bytes kept for the backward pass alone, by which a step's time goes."""
    return _kept(parts, tune, batch, placed)[0]


@dataclass(frozen=True)
class _Kept:
    kept: float
    working: float
    flows: bool


def _part_kept(part: Part, tune: Tune, batch: MicroBatch, units: float, placed: Placement, flows: bool) -> _Kept:
    kept, working, widest = 0.0, 0.0, 0.0
    before: Layer | None = None
    blocks = max(len(part.blocks), 1)
    for tuned in tuned_layers(part, tune):
        layer = tuned.layer
        if layer is part.head:
            break
        flows = flows or bool(tuned.rank) or (tuned.trained and layer.parameters > 0)
        widest = max(widest, _width(tuned) * units * placed.compute_bytes)
        if flows:
            kept += units * _layer_kept(tuned, placed, before)
            if isinstance(layer, Attention):
                kept += _tables(layer, batch, units, placed)
        before = layer
    working = WORKING * widest
    if placed.checkpointing and part.blocks and flows and part.head is not None:
        bounds = units * part.width * (2.0 if placed.narrow_stream else 4.0) * blocks
        kept, working = bounds, max(working, kept / blocks)
    return _Kept(kept, working, flows)


def _width(tuned: Tuned) -> float:
    layer = tuned.layer
    return float(layer.outputs * layer.rows) if isinstance(layer, Linear) else 0.0


def _layer_kept(tuned: Tuned, placed: Placement, before: Layer | None) -> float:
    """Bytes a unit that a layer keeps, where a gradient is asked of what comes out of it, the layer `before` it given."""
    layer, narrow = tuned.layer, float(placed.compute_bytes)
    if isinstance(layer, Linear):
        return _linear_kept(tuned, layer, placed, isinstance(before, Attention))
    if isinstance(layer, Depthwise):
        return layer.rows * layer.channels * narrow
    if isinstance(layer, Attention):
        return _attention_kept(layer, narrow, placed.on_gpu)
    if isinstance(layer, Norm) and placed.compiled and placed.narrow_stream:
        return layer.rows * layer.width * narrow
    if isinstance(layer, Norm):
        again = 4.0 if tuned.trained and not layer.fused else 0.0  # what its weight is multiplied with
        return layer.rows * layer.width * (4.0 + again)
    if isinstance(layer, Elementwise):
        each = layer.width * layer.rows
        if layer.kind == "dropout":
            return each * (1.0 if placed.on_gpu else narrow)
        twice = placed.compiled and layer.kind == "product"  # one factor is computed again of what is kept for it
        return each * narrow * (KEPT.get(layer.kind, 1) - twice)
    return 0.0


def _linear_kept(tuned: Tuned, layer: Linear, placed: Placement, behind_attention: bool) -> float:
    narrow = float(placed.compute_bytes)
    casts = (
        placed.narrow_stream and not placed.compiled
    )  # autocast gives each layer a copy of its own of what a norm gives
    held = behind_attention or (layer.shared and not casts)
    if tuned.rank and tuned.dropout:  # each adapter has a copy of its own, and what says which numbers it lacks
        return layer.rows * (narrow * (tuned.rank + layer.inputs) + layer.inputs * (1.0 if placed.on_gpu else narrow))
    if tuned.rank:
        return layer.rows * narrow * (tuned.rank + (0 if held else layer.inputs))
    if not tuned.trained or held:
        return 0.0
    return layer.rows * layer.inputs * narrow


def _attention_kept(layer: Attention, narrow: float, on_gpu: bool) -> float:
    """Queries, keys, values and output of a fused kernel; keys and values as often as it is handed them.

    A GPU's kernel takes fewer key heads as they are.
    """
    rows, keys = layer.queries or 1, layer.keys or 1
    key_heads = layer.key_heads if on_gpu else layer.heads
    return narrow * layer.head_dim * (2 * rows * layer.heads + 2 * keys * key_heads) + 4.0 * rows * layer.heads


def _tables(layer: Attention, batch: MicroBatch, units: float, placed: Placement) -> float:
    """Bytes of what has an entry for every two positions of a row: a mask, or scores that no fused kernel can cap."""
    if layer.queries is not None:
        return 0.0
    pairs = units * batch.row
    if layer.capped:
        return pairs * layer.heads * CAPPED
    return pairs * placed.compute_bytes if batch.masked else 0.0
