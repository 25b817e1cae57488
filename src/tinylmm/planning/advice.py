"""Which launches a training fits into, and the cheapest change that makes one fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tinylmm.planning.choose import STEP, Fit, fit_of, is_quantized, launched, settled
from tinylmm.planning.estimate import Device, Training
from tinylmm.sizing.cards import cards
from tinylmm.sizing.memory import GIB

RANKS = (2, 4, 8)
"""Devices that a change may ask for."""


def launches(training: Training) -> list[Fit]:
    """Local, DDP and the ZeRO stages, with the run's own number of ranks, or two; each with what is chosen for it."""
    ranks = max(training.launch.nproc, 2)
    asked = [("local", 1), ("ddp", ranks), ("zero2", ranks), *([] if is_quantized(training) else [("zero3", ranks)])]
    return [fit_of(launched(training, **_fields(name, count))) for name, count in asked]


def advice(training: Training) -> str:
    """The cheapest change that makes the run's launch fit, a sentence; empty where it fits or nobody knows.

    Cheaper is first fewer devices, then no activations computed twice, then the larger micro-batch: none of these changes
    what is learnt.
    """
    card = training.device.card
    if card is None or fit_of(training).fits:
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
    """The cards that hold the run's own launch, with what is chosen for each of them, smallest first."""
    each = sorted(cards().values(), key=lambda card: card.memory_bytes)
    return [card.key for card in each if fit_of(settled(replace(training, device=Device(card, True)))).fits]


def gib(size: float) -> str:
    """Bytes in GiB, to a tenth."""
    return f"{size / GIB:.1f}"


def amount(size: float) -> str:
    """Bytes with a unit that shows them: 1.2 GiB, 36.3 MiB."""
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def smaller(training: Training) -> str:
    """Half as much at once as the launch takes: a word of its own; empty where it cannot take less."""
    if training.positions is None:
        return f"launch.micro_batch={training.micro_batch // 2}" if training.micro_batch > 1 else ""
    half = training.positions // 2 // STEP * STEP
    return f"launch.row_tokens={half}" if half else ""


def _fields(sharding: str, ranks: int) -> dict[str, Any]:
    """Fields of a launch with this sharding."""
    stage = int(sharding.removeprefix("zero")) if sharding.startswith("zero") else None
    backend = "local" if sharding == "local" else "torchrun"
    return {"backend": backend, "nproc": ranks, "nodes": 1, "deepspeed_stage": stage}


def _sizes(training: Training) -> list[dict[str, int]]:
    """As much at once as the run has it, and ever less; nothing to say where that is chosen by itself."""
    if training.asked.micro_batch == "auto" and training.asked.row_tokens == "auto":
        return [{}]
    name = "micro_batch" if training.positions is None else "row_tokens"
    size, least = training.positions or training.micro_batch, 1 if training.positions is None else STEP
    sizes: list[dict[str, int]] = [{}]
    while size // 2 >= least:
        size //= 2
        sizes.append({name: size})
    return sizes


def _changes(training: Training) -> Iterator[tuple[str, Fit]]:
    """Changes of the launch in words, cheapest first."""
    own = training.placement()
    shardings = [(own.sharding, own.ranks)]
    for ranks in (count for count in RANKS if count >= own.ranks):
        shardings += [(name, ranks) for name in ("zero2", *(() if is_quantized(training) else ("zero3",)))]
    again = [{}, {"gradient_checkpointing": True}] if training.asked.gradient_checkpointing is False else [{}]
    for sharding, ranks in shardings:
        if training.stage.global_batch < ranks:
            continue
        moved = (sharding, ranks) != (own.sharding, own.ranks)
        for checkpointing in again:
            for size in _sizes(training):
                words = [f"launch={sharding}", f"launch.nproc={ranks}"] if moved else []
                words += [f"launch.{name}={value}" for name, value in size.items()]
                words += ["launch.gradient_checkpointing=true"] if checkpointing else []
                if words:
                    fields = (_fields(sharding, ranks) if moved else {}) | checkpointing | size
                    yield " ".join(words), fit_of(launched(training, **fields))
