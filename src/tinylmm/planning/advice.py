"""Which launches a training fits into, and the cheapest change that makes one fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tinylmm.planning.estimate import Training
from tinylmm.sizing.cards import cards
from tinylmm.sizing.memory import GIB, Memory, Placement

RANKS = (2, 4, 8)
"""Devices that a change may ask for."""


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


def launches(training: Training) -> list[Fit]:
    """Local, DDP and the ZeRO stages, with the run's own number of ranks, or two."""
    launch = training.launch
    ranks = max(launch.nproc, 2)
    asked = [("local", 1), ("ddp", ranks), ("zero2", ranks), *([] if _quantized(training) else [("zero3", ranks)])]
    return [
        _fit(training, training.placed(name, count, training.micro_batch, launch.gradient_checkpointing))
        for name, count in asked
    ]


def chosen(training: Training) -> Fit:
    """The run's own launch."""
    return _fit(training, training.placement())


def advice(training: Training) -> str:
    """The cheapest change that makes the run's launch fit, a sentence; empty where it fits or nobody knows.

    Cheaper is first fewer devices, then no activations computed twice, then the larger micro-batch: none of these changes
    what is learnt.
    """
    card = training.device.card
    if card is None or chosen(training).fits:
        return ""
    for words, fit in _changes(training):
        if fit.fits:
            return f"{words} fits: {gib(fit.memory.total)} of {gib(card.memory_bytes)} GiB."
    larger = [key for key, other in cards().items() if other.memory_bytes > card.memory_bytes]
    fix = f"launch.gpu={larger[0]}, " if larger else ""
    return (
        f"no number of ranks up to {max(RANKS)}, micro-batch or sharding fits into {gib(card.memory_bytes)} GiB: "
        f"take {fix}recipe=lora or qlora, or a smaller llm."
    )


def fitting_cards(training: Training) -> list[str]:
    """The cards that hold the run's own launch, smallest first."""
    needed = chosen(training).memory.total
    return [card.key for card in sorted(cards().values(), key=lambda c: c.memory_bytes) if needed <= card.memory_bytes]


def gib(size: float) -> str:
    """Bytes in GiB, to a tenth."""
    return f"{size / GIB:.1f}"


def amount(size: float) -> str:
    """Bytes with a unit that shows them: 1.2 GiB, 36.3 MiB."""
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _fit(training: Training, placed: Placement, micro_batch: int | None = None) -> Fit:
    memory = training.memory(placed, micro_batch or training.micro_batch)
    card = training.device.card
    return Fit(placed, memory, None if card is None else memory.total <= card.memory_bytes)


def _quantized(training: Training) -> bool:
    return any(not isinstance(tune, str) and "qlora" in tune for tune in training.tune.values())


def _changes(training: Training) -> Iterator[tuple[str, Fit]]:
    """Changes of the launch in words, cheapest first."""
    launch, own = training.launch, training.placement()
    micro = [training.micro_batch]
    while micro[-1] > 1:
        micro.append(micro[-1] // 2)
    shardings = [(own.sharding, own.ranks)]
    for ranks in (count for count in RANKS if count >= own.ranks):
        shardings += [(name, ranks) for name in ("zero2", *(() if _quantized(training) else ("zero3",)))]
    for sharding, ranks in shardings:
        if training.stage.global_batch < ranks:
            continue
        for checkpointing in sorted({launch.gradient_checkpointing, True}):
            for size in micro:
                words = []
                if (sharding, ranks) != (own.sharding, own.ranks):
                    words += [f"launch={sharding}", f"launch.nproc={ranks}"]
                if size != training.micro_batch:
                    words.append(f"launch.micro_batch={size}")
                if checkpointing != launch.gradient_checkpointing:
                    words.append("launch.gradient_checkpointing=true")
                yield " ".join(words), _fit(training, training.placed(sharding, ranks, size, checkpointing), size)
