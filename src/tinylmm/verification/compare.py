"""How far two ways of the same training steps may lie apart, and how far they do."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from tinylmm.verification.reference import Steps

EXACT_SHARE = 1e-6
"""fp32 rounds at 6e-8; sums over some thousand numbers in another order differ by this share of the largest of them."""
NOISE_TIMES = {"fp32": 20.0, "bf16": 4.0, "fp16": 4.0}
"""How often the reference's own rounding a fast path may be off. What that is comes from two runs of the reference: in fp32
with a step's samples in reverse order, in bf16 and fp16 with products computed in them."""


@dataclass(frozen=True)
class Difference:
    """How far some numbers lie apart, and what that is held against.

    Attributes:
        value: largest absolute difference.
        share: the largest share that a difference has of its own tolerance; above 1 they differ.
        tolerance: of the number with that share.
    """

    value: float = 0.0
    share: float = 0.0
    tolerance: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether every number is within its tolerance."""
        return self.share <= 1.0

    def worse(self, other: Difference) -> Difference:
        """Of both together."""
        held = self if self.share >= other.share else other
        return Difference(max(self.value, other.value), held.share, held.tolerance)

    def as_json(self) -> dict[str, float | None]:
        """As it stands in a certificate; None for what is not finite."""
        return {"difference": _finite(self.value), "tolerance": self.tolerance}


_NEVER = Difference(inf, inf)
"""Of what is not there, or no number."""


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None


@dataclass(frozen=True)
class Compared:
    """Some training steps beside the reference's.

    Attributes:
        loss: of all steps.
        gradients: of the first step, by part; empty where nobody has them.
        weights: after the last step, by part.
    """

    loss: Difference
    gradients: dict[str, Difference]
    weights: dict[str, Difference]

    @property
    def worst(self) -> float:
        """The largest share of a tolerance."""
        return max(one.share for one in (self.loss, *self.gradients.values(), *self.weights.values()))

    @property
    def equal(self) -> bool:
        """Whether all is within its tolerance."""
        return self.worst <= 1.0

    def as_json(self) -> dict[str, Any]:
        """As it stands in a certificate."""
        return {
            "loss": self.loss.as_json(),
            "gradients": {part: one.as_json() for part, one in self.gradients.items()},
            "weights": {part: one.as_json() for part, one in self.weights.items()},
            "worst_share_of_tolerance": _finite(self.worst),
        }


class Yardstick:
    """The reference's steps with its own noise: what others are held against.

    Args:
        reference: in fp32.
        again: the reference run so that only its rounding is another.
        precision: of the steps that will be compared.
    """

    def __init__(self, reference: Steps, again: Steps, precision: str) -> None:
        self.reference, self.again, self.times = reference, again, NOISE_TIMES[precision]
        self.gradient_tolerance = self._gradient_tolerances()

    def compare(self, found: Steps) -> Compared:
        """Hold some steps against the reference's."""
        gradients: dict[str, Difference] = {}
        if found.gradients:
            for name, expected in self.reference.gradients.items():
                there = found.gradients.get(name)
                one = _held(there, expected, torch.tensor(self.gradient_tolerance[name]))
                gradients[_part(name)] = gradients.get(_part(name), Difference()).worse(one)
        weights: dict[str, Difference] = {}
        for name, expected in self.reference.weights.items():
            one = _held(found.weights.get(name), expected, self._weight_tolerance(name))
            weights[_part(name)] = weights.get(_part(name), Difference()).worse(one)
        return Compared(self._losses(found), gradients, weights)

    def _losses(self, found: Steps) -> Difference:
        expected, again = self.reference.losses, self.again.losses
        if len(found.losses) != len(expected):
            return _NEVER
        noise = max(abs(other - loss) for loss, other in zip(expected, again, strict=True))
        worst = Difference()
        for one, loss in zip(found.losses, expected, strict=True):
            tolerance, apart = max(EXACT_SHARE * max(1.0, abs(loss)), self.times * noise), abs(one - loss)
            worst = worst.worse(Difference(apart, apart / tolerance, tolerance) if isfinite(one) else _NEVER)
        return worst

    def _gradient_tolerances(self) -> dict[str, float]:
        """Of each tensor: 1e-6 of its part's largest gradient, or some times the reference's noise in that part."""
        expected, again = self.reference.gradients, self.again.gradients
        largest: dict[str, float] = {}
        for name, gradient in expected.items():
            noise = self.times * float((again[name] - gradient).abs().max())
            allowed = max(EXACT_SHARE * float(gradient.abs().max()), noise, 1e-30)
            largest[_part(name)] = max(largest.get(_part(name), 0.0), allowed)
        return {name: largest[_part(name)] for name in expected}

    def _weight_tolerance(self, name: str) -> Tensor:
        """Of each weight: 1e-6 of the tensor's largest, and what its optimiser makes of a gradient within its own tolerance.

        AdamW divides a gradient by its size: where that is little more than rounding, so is the direction of the step.
        """
        weight, again = self.reference.weights[name], self.again.weights[name]
        exact = EXACT_SHARE * max(float(weight.abs().max()), 1e-3)
        tolerance = torch.full_like(weight, exact)
        if self.reference.moved_by is None:
            return tolerance + self.times * float((again - weight).abs().max())
        allowed = self.gradient_tolerance.get(name, 0.0)
        for rate, inverse in self.reference.moved_by[name]:
            tolerance += rate * (2.0 * allowed * inverse.float()).clamp(max=2.0)
        return tolerance


def _held(found: Tensor | None, expected: Tensor, tolerance: Tensor) -> Difference:
    if found is None or found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return _NEVER
    if not found.numel():
        return Difference()
    apart = (found - expected).abs().flatten()
    shares = apart / tolerance.flatten()
    worst = int(shares.argmax())
    return Difference(
        float(apart.max()), float(shares[worst]), float(tolerance.flatten()[min(worst, tolerance.numel() - 1)])
    )


def _part(name: str) -> str:
    return name.partition(".")[0]


def identical(one: Steps, other: Steps) -> Compared:
    """Hold steps against others that must be theirs bit by bit."""

    parts: dict[str, Difference] = {}
    for name, expected in other.weights.items():
        found = one.weights.get(name)
        parts[_part(name)] = parts.get(_part(name), Difference()).worse(_same_bits(found, expected))
    apart = max((abs(a - b) for a, b in zip(one.losses, other.losses, strict=False)), default=0.0)
    return Compared(Difference() if one.losses == other.losses else Difference(apart, inf), {}, parts)


def _same_bits(found: Tensor | None, expected: Tensor) -> Difference:
    if found is None or found.shape != expected.shape:
        return _NEVER
    return Difference() if torch.equal(found, expected) else Difference(float((found - expected).abs().max()), inf)
