"""Every way of tuning goes through DistributedDataParallel, which stops at a trainable parameter that gets no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.builders import IMAGE_SIZE, tiny_lmm, tuning
from tinylmm.models.tuning import enable_checkpointing

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear", "bias": "none", "rslora": False}
QLORA = LORA | {"bits": 4, "quant_type": "nf4", "double_quant": True}
TUNES: list[dict[str, Any]] = [
    {"llm": {"lora": LORA}, "vision_tower": "frozen", "connector": "full"},
    {"llm": {"qlora": QLORA}, "vision_tower": {"lora": LORA}, "connector": {"lora": LORA}},
    {"llm": {"qlora": QLORA | {"bits": 8}}, "vision_tower": {"qlora": QLORA}, "connector": "frozen"},
    {"llm": {"lora": LORA | {"bias": "all"}}, "vision_tower": {"lora": LORA | {"bias": "all"}}, "connector": "frozen"},
    {"llm": "full", "vision_tower": "full", "connector": "full"},
    {"llm": "frozen", "vision_tower": {"from_layer": 0.5}, "connector": "frozen"},
]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: DDP registers, broadcasts and reduces as with many."""
    path = tmp_path_factory.mktemp("group") / "rendezvous"
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "tune", TUNES, ids=lambda tune: "-".join(t if isinstance(t, str) else "+".join(t) for t in tune.values())
)
def test_three_steps_with_and_without_an_image_reduce_every_gradient(tune: dict[str, Any], group: None) -> None:
    model = tiny_lmm().train()
    tuning(model, tune)
    enable_checkpointing(model)
    model.blank_image = "connector"  # as set with several ranks: one of them may have no image in a step
    wrapped = DistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.tensor([[-200] * 4 + [5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12]])
    targets = torch.tensor([[-100] * 4 + [6, 7, 8, 2], [6, 7, 8, 9, 10, 11, 12, 2]])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for row, pixels in (
        (0, torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)),
        (1, None),
        (0, torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)),
    ):
        output = wrapped(tokens[row][None], torch.arange(8)[None], targets[row][None], pixels)
        output.loss_sum.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
