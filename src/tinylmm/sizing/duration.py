"""How long a training step takes: products at the rate that a device reaches, all else by the memory it reads and writes.

The one constant, PASSES, was fitted to eleven trainings of this project measured on one H200 (three LLMs of 0.5 to 2.8 billion
parameters, micro-batches of 16 to 64): it gives 0.87 to 1.22 of what they took. With micro-batches of 8 a GPU waits for its
host, and trainings took up to 1.9 times as long. What ranks send each other is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinylmm.sizing.cards import Card

PASSES = 38.0
"""How often what is kept for the backward pass is read or written: by norms, activations, casts and copies."""
OPTIMIZER_PASSES = 2.0
"""How often weights, gradients and the optimiser's state are read or written in a step."""


@dataclass(frozen=True)
class StepCost:
    """What a step asks of each device.

    Attributes:
        flops: products, with what checkpointing takes a second time.
        kept_bytes: kept for the backward pass, of all micro-batches.
        state_bytes: trained weights, their gradients and the optimiser's state.
        compute_bytes: of a number in the type that products are computed in.
    """

    flops: float
    kept_bytes: float
    state_bytes: float
    compute_bytes: int

    def seconds(self, card: Card) -> float:
        """Seconds of one step on a device."""
        moved = PASSES * self.kept_bytes + OPTIMIZER_PASSES * self.state_bytes
        return self.flops / card.product_flops(self.compute_bytes) + moved / card.copy_bytes
