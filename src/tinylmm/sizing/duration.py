"""How long a training step takes: products at the rate that a device reaches, all else by the memory it reads and writes.

The constants, PASSES, were fitted to trainings of this project measured on one H200 (`benchmarks/results/gpu.json`): with them
it gives 0.94 to 1.06 of what Phi-2 and TinyLlama with SigLIP took in both stages, compiled, at the published batch sizes, and
1.0 of what Phi-2 took without. Steps of a quarter of that took up to 1.2 times as long. What ranks send each other is left
out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinylmm.sizing.cards import Card

PASSES = {True: 11.5, False: 27.0}
"""Whether blocks are compiled -> how often what is kept for the backward pass is read or written: by norms, activations, casts
and copies."""
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
        compiled: whether blocks are compiled.
    """

    flops: float
    kept_bytes: float
    state_bytes: float
    compute_bytes: int
    compiled: bool = False

    def seconds(self, card: Card) -> float:
        """Seconds of one step on a device."""
        moved = PASSES[self.compiled] * self.kept_bytes + OPTIMIZER_PASSES * self.state_bytes
        return self.flops / card.product_flops(self.compute_bytes) + moved / card.copy_bytes
