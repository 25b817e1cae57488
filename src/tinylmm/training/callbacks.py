"""What a training stage tells the outside while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

KEPT = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
FIGURES = (
    "samples_per_s",
    "tokens_per_s",
    "text_tokens_per_s",
    "image_tokens_per_s",
    "supervised_tokens_per_s",
    "mfu",
    "peak_share",
    "data_wait",
    "padding",
    "samples_per_row",
    "pixel_reads",
    "pixel_hit_rate",
    "peak_memory_gib",
    "eta_s",
    "run_eta_s",
)
"""What `training/figures.py` adds to what Trainer logs."""


class MetricsRow(TrainerCallback):
    """Writes a row to metrics.jsonl whenever Trainer logs: loss, learning rate, gradient norm, and the figures.

    Args:
        write: takes the row's fields; called on rank 0 only.
        device: what `mfu` and `peak_share` are shares of, in words.
    """

    def __init__(self, write: Callable[..., None], device: str) -> None:
        self.write = write
        self.device = device

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one row."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        row: dict[str, Any] = {ours: float(logs[theirs]) for theirs, ours in KEPT.items() if theirs in logs}
        row |= {name: logs[name] for name in FIGURES if name in logs}
        if {"mfu", "peak_share"} & row.keys():
            row["device"] = self.device
        self.write(step=state.global_step, steps=state.max_steps, **row)
