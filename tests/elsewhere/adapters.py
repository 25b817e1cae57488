"""Models with adapters, far from what they began with, for programs that put an adapter on a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.builders import tuning
from tinylmm.models.checkpoint import load_model, save_model

LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "bias": "none"}
ADAPTED: dict[str, dict[str, Any]] = {
    "lora": {"llm": {"lora": LORA}, "vision_tower": "frozen", "connector": "full"},
    "every-part": {
        "llm": {"lora": LORA | {"bias": "lora_only"}},
        "vision_tower": {"lora": LORA | {"r": 2, "bias": "lora_only"}},
        "connector": {"lora": LORA | {"alpha": 16, "bias": "lora_only"}},
    },
    "qlora": {
        "llm": {"qlora": LORA | {"bits": 4, "quant_type": "nf4", "double_quant": True}},
        "vision_tower": "frozen",
        "connector": "full",
    },
}


def adapted(base: Path, folder: Path, name: str, far: float = 0.3) -> Path:
    """A model on a saved base, whose adapters, and whole parts trained beside them, are far from where they began.

    Args:
        name: among ADAPTED.
        far: standard deviation of what was added to each number.
    """
    loaded = load_model(base, [])
    adapters = {part: one.adapter for part, one in tuning(loaded.model, ADAPTED[name]).items() if one.adapter}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in loaded.model.parameters() if p.requires_grad):
            parameter.add_(far * torch.randn_like(parameter))
    save_model(loaded, folder, None, {part: base / part for part in adapters}, adapters)
    return folder
