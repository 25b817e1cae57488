"""Which parameters a stage trains: a part is frozen, full, or trained from one of its blocks on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tinylmm.models.llm import decoder_of
from tinylmm.models.lmm import LMM


@dataclass(frozen=True)
class PartTuning:
    """What was decided for one part: its mode in words, and trained of all parameters."""

    mode: str
    trained: int
    total: int


def apply_tuning(model: LMM, tune: dict[str, Any]) -> dict[str, PartTuning]:
    """Set `requires_grad` on every parameter of the model by the stage's `tune` mapping.

    Args:
        tune: part -> "frozen", "full" or {"from_layer": block index, or fraction of the depth}.

    Raises:
        ValueError: a block index lies outside the part's depth.
    """
    return {
        "llm": _tune(model.llm, decoder_blocks(model.llm), None, tune["llm"], "llm"),
        "vision_tower": _tune_tower(model, tune["vision_tower"]),
        "connector": _tune(model.connector, nn.ModuleList(), None, tune["connector"], "connector"),
    }


def decoder_blocks(llm: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a causal LM: the list that is as long as its config says it is deep."""
    depth = llm.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for child in decoder_of(llm).children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise ValueError(f"{type(llm).__name__} keeps its {depth} blocks in no list, so from_layer cannot be applied")


def _tune_tower(model: LMM, tune: Any) -> PartTuning:
    tower = model.vision_tower
    result = _tune(tower, tower.blocks, tower.depth, tune, "vision_tower")
    # Behind the selected layer nothing reaches the loss: a trainable parameter there would make DDP wait for ever.
    for parameter in tower.unreached_parameters():
        parameter.requires_grad = False
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    return PartTuning(result.mode, trained, result.total)


def _tune(part: nn.Module, blocks: nn.ModuleList, depth: int | None, tune: Any, name: str) -> PartTuning:
    mode = tune if isinstance(tune, str) else "from_layer"
    for parameter in part.parameters():
        parameter.requires_grad = mode == "full"
    if isinstance(tune, dict):
        depth = depth or len(blocks)
        first = tune["from_layer"]
        index = int(first * depth) if isinstance(first, float) else first
        if index >= len(blocks):
            raise ValueError(
                f"tune.{name}.from_layer is {first}, but the part runs {len(blocks)} blocks (0 to {len(blocks) - 1})"
            )
        for block in blocks[index:]:
            for parameter in block.parameters():
                parameter.requires_grad = True
        mode = f"from block {index} of {depth}"
    total = sum(p.numel() for p in part.parameters())
    return PartTuning(mode, sum(p.numel() for p in part.parameters() if p.requires_grad), total)
