"""What each training of a run will take, before it is started: parameters, FLOPs, memory, disk, time, money. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinylmm.config.cores import usable_cores
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import RecipeStage
from tinylmm.config.spec import RunSpec
from tinylmm.planning.lengths import ClipTokens, Lengths, Prepared, assumed_lengths, read_lengths
from tinylmm.planning.shapes import Shapes, shapes_of
from tinylmm.sizing.cards import Card, cards, gpu_names, this_machine
from tinylmm.sizing.duration import StepCost
from tinylmm.sizing.flops import PARTS, Flops, Sample, block_forward, first_pass_flops, sample_flops
from tinylmm.sizing.memory import GIB, Memory, MicroBatch, Placement, kept_bytes, step_memory
from tinylmm.sizing.parameters import Tune, adapter_of, total_parameters, trained_parameters

OPTIMIZER_BYTES = {
    "adamw_bf16": 4.0,
    "muon": 4.5,
    "adafactor": 0.1,
    "sgd": 4.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "ademamix": 12.0,
}
"""State of an optimiser for a trained parameter, where it is not AdamW's two fp32 numbers; `optimizer_bytes` has the rest.
Of Muon a matrix has one number, and embeddings and heads, some tenth of an LLM, have AdamW's."""
PADDING = 1.05
"""Positions of packed rows over those of their samples: assumed."""


@dataclass(frozen=True)
class Device:
    """What a plan reckons with.

    Attributes:
        card: None where neither launch.gpu nor this machine says what it can do.
        on_gpu: whether it is a GPU.
    """

    card: Card | None
    on_gpu: bool

    @classmethod
    def of(cls, launch: LaunchSpec, precision: str) -> Device:
        """The card that launch.gpu names; else this machine's, or its CPU for what may run there."""
        if launch.gpu != "auto":
            return cls(cards()[launch.gpu], True)
        gpus = [] if launch.device == "cpu" else gpu_names()
        if gpus or launch.device == "cpu" or precision == "fp32":
            return cls(this_machine(gpus), bool(gpus))
        return cls(None, True)


@dataclass(frozen=True)
class Training:
    """One training of a run and all that its cost depends on.

    Attributes:
        asked: the launch as the run has it.
        launch: as it is reckoned with; `planning/choose.py` puts what it chooses in place of each `auto`.
    """

    name: str
    stage: RecipeStage
    shapes: Shapes
    tune: Mapping[str, Tune]
    lengths: Lengths
    asked: LaunchSpec
    launch: LaunchSpec
    device: Device
    optimizer: str | None

    @classmethod
    def of(cls, run: RunSpec, name: str, prepared: Sequence[Prepared]) -> Training:
        """Gather it from the run's spec.

        Args:
            name: of the recipe's stage.
            prepared: its sources; empty where they are not all prepared yet.

        Raises:
            UnknownShapeError: what a part looks like is not known.
        """
        stage, shapes = run.recipe.stages[name], shapes_of(run, name)
        counted = (shapes.image_tokens, stage.max_length, ClipTokens(shapes.clip_tokens(0), shapes.frame_tokens))
        if prepared:
            lengths = read_lengths(prepared, *counted)
        else:
            captions, sampling = stage.template == "pretrain", run.video.sampling
            lengths = assumed_lengths(run.data.name, stage.mixture, captions, *counted, sampling)
        if lengths.clips > lengths.images:
            shapes = shapes.with_clips(run, max(1, round(lengths.frames / lengths.clips)))
        device = Device.of(run.launch, stage.precision)
        tune = stage.tune.model_dump(mode="json", exclude_none=True)
        return cls(name, stage, shapes, tune, lengths, run.launch, run.launch, device, run.trainer.optim)

    @property
    def parts(self) -> dict[str, Any]:
        """The three parts as layers."""
        return self.shapes.parts

    @property
    def cached_bytes(self) -> float | None:
        """Size of the frozen tower's features on disk; None where how many images there are is not known."""
        if self.lengths.samples is None:
            return None
        tower = self.parts["vision_tower"]
        return self.lengths.samples * self.views * tower.tokens * tower.width * self.compute_bytes

    @property
    def views(self) -> float:
        """How often the tower looks for a mean sample: at each image, tile and frame."""
        return self.lengths.images * self.shapes.views + self.lengths.frames

    @property
    def connected(self) -> float:
        """What the connector is given for a mean sample: as many, or the frames of a clip as one."""
        found = self.lengths
        return found.images + found.clips if self.shapes.together else self.views

    @property
    def cached(self) -> bool:
        """Whether the tower's features are computed once and kept."""
        if not self.launch.cache_features or self.stage.tune.vision_tower != "frozen" or self.cached_bytes is None:
            return False
        return self.cached_bytes <= self.launch.cache_features_gib * GIB

    @property
    def pixel_bytes(self) -> float:
        """What the training adds to the pixel cache at most; a store that has some of its images needs less."""
        launch, count = self.launch, self.lengths.samples
        if launch.cache_pixels is False or self.cached or count is None:
            return 0.0
        size, limit = count * self.views * self.shapes.view_bytes, launch.cache_pixels_gib * GIB
        steps = self.steps
        again = self.stage.epochs > 1 and steps is not None and steps * self.stage.global_batch > count
        return min(size, limit) if launch.cache_pixels is True else size if again and size <= limit else 0.0

    @property
    def compute_bytes(self) -> int:
        """Of a number in the type that the stage computes in."""
        return 4 if self.stage.precision == "fp32" else 2

    @property
    def steps(self) -> int | None:
        """Optimiser steps; None where the number of samples is not known."""
        if self.lengths.samples is None:
            return self.stage.max_steps
        wanted = math.ceil(self.lengths.samples * self.stage.epochs / self.stage.global_batch)
        return wanted if self.stage.max_steps is None else min(wanted, self.stage.max_steps)

    @property
    def sample(self) -> Sample:
        """A mean sample."""
        found = self.lengths
        return Sample(found.tokens, found.squared, found.supervised, self.views, features=self.connected)

    @property
    def positions(self) -> int | None:
        """Positions that a rank takes at once; None where micro-batches are counted in samples."""
        return self.launch.positions(self.device.on_gpu)

    @property
    def micro_batch(self) -> int:
        """Samples that a rank takes at once; mean ones, where their positions are counted."""
        positions = self.positions
        if positions is None:
            assert self.launch.micro_batch != "auto"
            return self.launch.micro_batch
        return min(self.stage.global_batch, max(1, round(positions / self.lengths.tokens)))

    def placement(self) -> Placement:
        """How the launch of the run puts it on devices."""
        launch = self.launch
        sharding = f"zero{launch.sharding}" if launch.sharding else "ddp" if launch.ranks > 1 else "local"
        return Placement(
            sharding,
            launch.ranks,
            self.compute_bytes,
            self.device.on_gpu,
            launch.checkpoints,
            self._accumulation(launch.ranks, self.micro_batch) > 1,
            optimizer_bytes(self.optimizer),
            self.device.on_gpu and launch.compile is not False and launch.sharding != 3,
            self.stage.fp8,
        )

    def placed(self, sharding: str, ranks: int, micro_batch: int, checkpointing: bool) -> Placement:
        """How another launch would put it on devices."""
        accumulates = self._accumulation(ranks, micro_batch) > 1
        own = self.placement()
        return replace(own, sharding=sharding, ranks=ranks, checkpointing=checkpointing, accumulates=accumulates)

    def memory(self, placed: Placement, micro_batch: int) -> Memory:
        """Memory of one device at its peak, where micro-batches are of many and long samples."""
        return step_memory(self.parts, self.tune, self._batch(placed, micro_batch), placed)

    def flops(self) -> dict[str, Flops]:
        """Of one sample, by part."""
        return sample_flops(self.parts, self.tune, self.sample, self.cached)

    def seconds_a_step(self, placed: Placement) -> float | None:
        """Of an optimiser step; None where what the device can do is not known."""
        if self.device.card is None:
            return None
        samples, sample = self.stage.global_batch / placed.ranks, self.sample
        flops = sum(self.flops().values(), Flops()).total
        if placed.checkpointing:
            flops += block_forward(self.parts, self.tune, sample)
        whole = replace(placed, checkpointing=False)
        kept = kept_bytes(self.parts, self.tune, self._mean_batch(samples), whole) * (
            1.33 if placed.checkpointing else 1
        )
        trained = sum(trained_parameters(self.parts[name], self.tune[name]) for name in PARTS)
        state = trained * (8.0 + placed.optimizer_bytes)
        if placed.sharding.startswith("zero"):
            state /= placed.ranks
        cost = StepCost(flops * samples, kept, state, self.compute_bytes, placed.compiled)
        return max(cost.seconds(self.device.card), self._reading_seconds(placed.ranks))

    def _reading_seconds(self, ranks: int) -> float:
        """Of reading a step's images beside it, where this machine's rate was measured; 0 where features are kept."""
        rate = None if self.device.card is None else self.device.card.images_per_s
        if rate is None or self.cached:
            return 0.0
        return (
            self.stage.global_batch * (self.lengths.images + self.lengths.frames) / (rate * max(usable_cores(), ranks))
        )

    def first_pass_seconds(self) -> float:
        """Of computing the features that are kept, on all ranks together."""
        if not self.cached or self.device.card is None or self.lengths.samples is None:
            return 0.0
        images = self.lengths.samples * self.views
        return (
            first_pass_flops(self.parts, images)
            / self.device.card.product_flops(self.compute_bytes)
            / self.launch.ranks
        )

    def _accumulation(self, ranks: int, micro_batch: int) -> int:
        return math.ceil(self.stage.global_batch / (micro_batch * ranks))

    def _mean_batch(self, samples: float) -> MicroBatch:
        images = 0.0 if self.cached else samples * self.sample.images
        tokens = samples * self.lengths.tokens * PADDING
        return MicroBatch(
            tokens, self._row(tokens), samples * self.lengths.supervised, images, samples * self.connected
        )

    def _batch(self, placed: Placement, micro_batch: int) -> MicroBatch:
        """The largest micro-batch to expect: two deviations over the mean."""
        share = math.ceil(self.stage.global_batch / (placed.ranks * self._accumulation(placed.ranks, micro_batch)))
        found, image = self.lengths, self.shapes.parts["vision_tower"]
        longest = min(float(self.stage.max_length), found.tokens + 2 * found.deviation)
        tokens = min(share * found.tokens + 2 * found.deviation * share**0.5, share * float(self.stage.max_length))
        tokens = tokens * PADDING if self.launch.packing else share * longest
        if self.positions is not None:  # no row is longer, but for a sample that is longer by itself
            tokens = min(tokens, max(float(self.positions), longest))
        row = self._row(tokens) if self.launch.packing else longest
        images = share * self.sample.images
        pixels = image.pixels
        seen = 0.0 if self.cached else images
        connected = share * self.connected
        return MicroBatch(tokens, row, share * found.supervised, seen, connected, pixels, self._masked())

    def _row(self, tokens: float) -> float:
        row = self.positions or self.launch.row_tokens
        return min(float(self.stage.max_length if row == "auto" else row), tokens)

    def _masked(self) -> bool:
        """Whether attention takes a mask: with varlen and flash-attn it takes bounds."""
        return self.launch.attention in ("sdpa", "eager")


def optimizer_bytes(name: str | None) -> float:
    """Bytes of an optimiser's state for a trained parameter, by `trainer.optim`."""
    kind = name or "adamw"
    plain = kind.removeprefix("paged_")
    if plain.startswith("lion"):
        return 1.0 if plain.endswith("8bit") else 4.0
    known = next((size for key, size in OPTIMIZER_BYTES.items() if plain.startswith(key)), 8.0)
    return known / 4 if plain.endswith("8bit") else known


def disk_bytes(training: Training) -> dict[str, float]:
    """What a training leaves on disk, and what its checkpoints take while it runs."""
    tune, parts, keep = training.tune, training.parts, training.launch.keep_checkpoints
    model = published = trained = 0.0
    for name in PARTS:
        ours, how = trained_parameters(parts[name], tune[name]), tune[name]
        total, adapted = total_parameters(parts[name]), adapter_of(how) is not None
        trained += ours
        model += 4.0 * (ours if adapted else 0 if how == "frozen" else total)
        published += 4.0 * total if training.stage.start == "parts" and (adapted or how == "frozen") else 0.0
    checkpoint = trained * (4.0 + optimizer_bytes(training.optimizer))
    features = (training.cached_bytes or 0.0) if training.cached else 0.0
    return {
        "model": model,
        "unchanged_parts": published,
        "checkpoints": checkpoint * (keep + 1),  # one more while the newest is written
        "features": features,
        "pixels": training.pixel_bytes,
    }
