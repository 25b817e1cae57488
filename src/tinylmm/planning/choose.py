"""What a launch leaves open (`auto`), chosen so that the memory plan has room: rows, checkpointing, sharding. No torch.

Of what fits, the fastest by what was measured on one H200 (Phi-2 with SigLIP): computing activations again costs a quarter of
the speed and more, sharing state out some of it, and a row of 4,096 positions little against one of 16,384. The goals of
`benchmarks/gpu.py` were measured with 20,480.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from tinylmm.config.launch import ROW_TOKENS
from tinylmm.config.trainer import OWN_OPTIMIZERS
from tinylmm.planning.estimate import Training
from tinylmm.sizing.memory import Memory, Placement

STEP = 1024
"""Positions by which rows differ, so that kernels have even tiles."""
LONGEST = 20 * STEP
"""Positions of a row at most."""
USEFUL = 4 * STEP
"""Positions from which a GPU is busy: shorter rows are taken where nothing else fits."""
MARGIN = 0.05
"""Share of a card that a choice leaves free: the plan is no measurement."""

Sharding = Literal[2, 3] | None


@dataclass(frozen=True)
class Fit:
    """A launch and the memory that it takes of each device.

    Attributes:
        fits: None where the device's memory is not known.
    """

    placed: Placement
    memory: Memory
    fits: bool | None

    @property
    def label(self) -> str:
        """As `zero2 x4`."""
        return f"{self.placed.sharding} x{self.placed.ranks}"


def fit_of(training: Training) -> Fit:
    """The training as its launch is reckoned with."""
    placed = training.placement()
    memory, card = training.memory(placed, training.micro_batch), training.device.card
    return Fit(placed, memory, None if card is None else memory.total <= card.memory_bytes)


def launched(training: Training, **fields: Any) -> Training:
    """The training with other fields of its launch, and with what is chosen for those that stay open."""
    asked = training.asked.model_copy(update=fields)
    return settled(replace(training, asked=asked, launch=asked))


def settled(training: Training) -> Training:
    """The training with a choice in place of each `auto` of its launch.

    Where nothing fits it is what takes least. Where the memory of a GPU is not known, and on a CPU, nothing is shared out or
    computed again, and rows have their usual length.
    """
    asked, card = training.asked, training.device.card
    options = list(_options(training))
    if card is None or not training.device.on_gpu:
        return replace(training, launch=asked.model_copy(update=_plain(training)))
    for shortest in (USEFUL, STEP):
        for option in options:
            for rows in _rows(training, shortest):
                tried = replace(training, launch=asked.model_copy(update=option | rows))
                if fit_of(tried).memory.total <= (1.0 - MARGIN) * card.memory_bytes:
                    return tried
    return replace(training, launch=asked.model_copy(update=options[-1] | list(_rows(training, STEP))[-1]))


def choices(training: Training) -> dict[str, Any]:
    """Fields of the launch that were open and what was chosen for each, in the order of LaunchSpec."""
    asked, launch = training.asked.model_dump(mode="json"), training.launch.model_dump(mode="json")
    return {
        name: launch[name]
        for name in ("deepspeed_stage", "row_tokens", "gradient_checkpointing")
        if asked[name] == "auto" != launch[name]
    }


def _plain(training: Training) -> dict[str, Any]:
    asked, usual = training.asked, ROW_TOKENS["gpu" if training.device.on_gpu else "cpu"]
    rows = {"row_tokens": usual} if _counts_positions(training) else {}
    return rows | {"deepspeed_stage": asked.sharding, "gradient_checkpointing": asked.checkpoints}


def _counts_positions(training: Training) -> bool:
    """Whether the length of rows is open. With a number of samples it is the stage's own, `max_length`."""
    return training.asked.micro_batch == "auto" and training.asked.row_tokens == "auto"


def _rows(training: Training, shortest: int) -> Iterator[dict[str, int]]:
    """Lengths of rows from `shortest` on, the longest first; nothing to choose where they are given."""
    if _counts_positions(training):
        yield from ({"row_tokens": row} for row in range(LONGEST, shortest - 1, -STEP))
    else:
        yield {}


def _options(training: Training) -> Iterator[dict[str, Any]]:
    """Sharding and checkpointing, the fastest first."""
    asked = training.asked
    shardings: list[Sharding] = [asked.sharding]
    whole = training.optimizer in OWN_OPTIMIZERS or training.stage.fp8
    if asked.deepspeed_stage == "auto" and asked.ranks > 1 and not whole and find_spec("deepspeed") is not None:
        shardings += [2] if is_quantized(training) else [2, 3]
    again = [False, True] if asked.gradient_checkpointing == "auto" else [asked.checkpoints]
    lightly = [sharding for sharding in shardings if sharding != 3]
    for group in (lightly, [sharding for sharding in shardings if sharding == 3]):
        for checkpoints in again:
            for sharding in group:
                yield {"deepspeed_stage": sharding, "gradient_checkpointing": checkpoints}


def is_quantized(training: Training) -> bool:
    """Whether a part has weights of 4 or 8 bits, which ZeRO-3 cannot share out."""
    return any(not isinstance(tune, str) and "qlora" in tune for tune in training.tune.values())
