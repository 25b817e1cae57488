"""What counts as rounding, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tinylmm.verification.compare import Yardstick, identical
from tinylmm.verification.reference import Steps

RATE, NOISE = 1e-3, 1e-9


def steps() -> Steps:
    """A part of two tensors; the gradient of `llm.key` is nothing but rounding, which AdamW makes whole steps of."""
    torch.manual_seed(0)
    gradients = {"llm.weight": torch.randn(8, 8), "llm.key": torch.full((8,), NOISE)}
    weights = {"llm.weight": torch.randn(8, 8), "llm.key": torch.randn(8)}
    moved = {name: [(RATE, 1 / (gradient.abs() + 1e-8))] for name, gradient in gradients.items()}
    return Steps([2.5, 2.4], gradients, weights, moved)


def other_rounding(of: Steps) -> Steps:
    changed = of.gradients | {"llm.key": -of.gradients["llm.key"]}
    return replace(of, gradients=changed, weights=of.weights | {"llm.key": of.weights["llm.key"] + RATE})


def yardstick() -> Yardstick:
    return Yardstick(steps(), other_rounding(steps()), "fp32")


def test_the_reference_is_equal_to_itself_and_to_its_own_rounding() -> None:
    compared = yardstick().compare(other_rounding(steps()))
    assert compared.equal and yardstick().compare(steps()).worst == 0


@pytest.mark.parametrize("share", [1e-5, 1e-2])
def test_a_gradient_that_is_off_by_more_than_rounding_differs(share: float) -> None:
    found = steps()
    found.gradients["llm.weight"] = found.gradients["llm.weight"] * (1 + share)
    compared = yardstick().compare(found)
    assert not compared.gradients["llm"].equal and compared.loss.equal


def test_a_weight_that_moved_otherwise_differs_though_others_are_rounding() -> None:
    found = steps()
    found.weights["llm.weight"] = found.weights["llm.weight"] + 0.01 * RATE
    assert not yardstick().compare(found).weights["llm"].equal


@pytest.mark.parametrize("loss", [2.5001, float("nan"), float("inf")])
def test_a_loss_that_is_another_differs(loss: float) -> None:
    assert not yardstick().compare(replace(steps(), losses=[loss, 2.4])).equal


def test_what_is_not_there_differs() -> None:
    for found in (
        replace(steps(), losses=[2.5]),
        replace(steps(), gradients={"llm.weight": steps().gradients["llm.weight"]}),
        replace(steps(), weights={}),
    ):
        assert not yardstick().compare(found).equal


def test_bits_are_compared_where_they_must_be_equal() -> None:
    assert identical(steps(), steps()).equal
    found = steps()
    found.weights["llm.key"] = torch.nextafter(found.weights["llm.key"], torch.ones(8))
    assert not identical(found, steps()).equal
    assert not identical(replace(steps(), losses=[2.5, 2.4 + 1e-12]), steps()).equal
