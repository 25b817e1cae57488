"""What is trained gets gradients, what is frozen gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders import IMAGE_SIZE, tiny_lmm
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import apply_tuning


def gradients(model: LMM) -> set[str]:
    tokens = torch.tensor([[-200] * 4 + [5, 6, 7, 8]])
    output = model(
        input_ids=tokens,
        position_ids=torch.arange(8)[None],
        targets=torch.tensor([[-100] * 4 + [6, 7, 8, 2]]),
        pixel_values=torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE),
    )
    output.loss_sum.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("connector", ["frozen", "full"])
@pytest.mark.parametrize("tower", ["frozen", "full", {"from_layer": 1}, {"from_layer": 0.34}], ids=str)
@pytest.mark.parametrize("llm", ["frozen", "full", {"from_layer": 1}], ids=str)
def test_exactly_the_trainable_parameters_get_gradients(
    llm: Any, tower: Any, connector: str, checkpointing: bool
) -> None:
    if (llm, tower, connector) == ("frozen", "frozen", "frozen"):
        return
    model = tiny_lmm().train()
    apply_tuning(model, {"llm": llm, "vision_tower": tower, "connector": connector})
    if checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients(model) == trainable


def test_a_fraction_means_the_upper_part_of_the_whole_tower() -> None:
    model = tiny_lmm()
    report = apply_tuning(model, {"llm": "frozen", "vision_tower": {"from_layer": 0.34}, "connector": "full"})
    assert report["vision_tower"].mode == "from block 1 of 3"
    assert {n.split(".")[3] for n, p in model.vision_tower.named_parameters() if p.requires_grad} == {"1"}


def test_a_block_that_is_not_run_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"tune.vision_tower.from_layer is 2, but the part runs 2 blocks \(0 to 1\)"):
        apply_tuning(tiny_lmm(), {"llm": "frozen", "vision_tower": {"from_layer": 2}, "connector": "full"})
