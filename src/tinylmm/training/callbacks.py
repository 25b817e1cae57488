"""What a training stage tells the outside while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

KEPT = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}


class MetricsRow(TrainerCallback):
    """Writes a row to metrics.jsonl whenever Trainer logs: loss, learning rate, gradient norm, samples a second.

    Args:
        write: takes the row's fields; called on rank 0 only.
        global_batch: samples an optimiser step.
    """

    def __init__(self, write: Callable[..., None], global_batch: int) -> None:
        self.write = write
        self.global_batch = global_batch
        self._last = (0, time.monotonic())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the step that training starts or resumes from."""
        self._last = (state.global_step, time.monotonic())

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
        step, now = state.global_step, time.monotonic()
        row: dict[str, Any] = {ours: float(logs[theirs]) for theirs, ours in KEPT.items() if theirs in logs}
        if step > self._last[0]:
            row["samples_per_s"] = round((step - self._last[0]) * self.global_batch / max(now - self._last[1], 1e-9), 2)
        self._last = (step, now)
        self.write(step=step, steps=state.max_steps, **row)
