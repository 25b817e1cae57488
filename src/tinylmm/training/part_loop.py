"""The training loop that builds parts: plain AdamW steps with crash-safe checkpoints and exact resume.

A step's batch and loss depend on (seed, step) and the weights alone, so a checkpoint holds weights, optimiser and step,
and nothing has to be replayed: a run that was killed ends with the weights of one that was not, bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinylmm.errors import NonFiniteError, StoppedError
from tinylmm.stop import stop_requested
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import CHECKPOINT_FOLDER
from tinylmm.training.metrics import MetricsFile

log = logging.getLogger(__name__)

CHECKPOINT_FILE = f"{CHECKPOINT_FOLDER}/latest.pt"
SAVE_EVERY_S = 20.0
ADAM_BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
_MAGIC = b"tinylmm part checkpoint 1\n"


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps.
        batch: samples a step (for the progress rows).
        lr: peak learning rate; warmed up linearly, then a cosine down to zero.
        warmup_ratio: share of the steps that warm up.
        weight_decay: of matrices; vectors and scalars have none.
        save_every_s: seconds between checkpoints.
        log_steps: steps between progress rows.
    """

    steps: int
    batch: int
    lr: float
    warmup_ratio: float
    weight_decay: float
    save_every_s: float = SAVE_EVERY_S
    log_steps: int = 10


def train_loop(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    settings: LoopSettings,
    folder: Path,
    metrics: MetricsFile,
) -> float:
    """Train `model` in place, from the newest valid checkpoint if there is one.

    Args:
        model: in its initial state, the same at every try.
        loss_of_step: step from 0 -> scalar loss; draws its batch from (seed, step) alone.
        settings: how long and how fast.
        folder: the stage's work folder; its checkpoint lies in it.
        metrics: takes the progress rows.

    Returns:
        The last step's loss.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; no weight was touched by it.
        StoppedError: a stop was asked for; a checkpoint is on disk.
    """
    optimizer = _optimizer(model, settings)
    path = folder / CHECKPOINT_FILE
    first, known = _resume(path, model, optimizer)
    metrics.forget_after(first, known)
    model.train()
    saved = logged = time.monotonic()
    logged_step = first
    loss_value = math.nan
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(step, settings.steps, settings.warmup_ratio)
        loss = loss_of_step(step)
        loss_value = float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {step + 1} of {settings.steps}: loss {loss_value}, gradient norm {norm}. "
                "The weights are those of the step before; a smaller build.lr or a longer build.warmup_ratio may help."
            )
        optimizer.step()
        done, now = step + 1, time.monotonic()
        if done % settings.log_steps == 0 or done == settings.steps:
            speed = (done - logged_step) * settings.batch / max(now - logged, 1e-9)
            row = {"loss": loss_value, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            metrics.append(step=done, steps=settings.steps, **row, samples_per_s=round(speed, 1))
            logged, logged_step = now, done
        stop = stop_requested() and done < settings.steps
        if stop or done == settings.steps or now - saved >= settings.save_every_s:
            rows = metrics.content().decode()
            save_checkpoint(path, {**_state(model, optimizer), "step": done, "loss": loss_value, "rows": rows})
            saved = time.monotonic()
        if stop:
            raise StoppedError(f"stopped after step {done} of {settings.steps}; the same command continues from there")
    return loss_value if first < settings.steps else float(_read(path)["loss"])


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then a cosine that ends at zero."""
    warmup = max(1, round(steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, steps - warmup)))


def _optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=ADAM_BETAS, fused=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, bytes | None]:
    """Load the checkpoint at `path` if it is whole; return the step to go on with, and the progress rows until then."""
    state = load_checkpoint(path)
    if state is None:
        return 0, None
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    log.info("resuming from step %d (%s)", state["step"], path)
    rows = state.get("rows")
    return int(state["step"]), None if rows is None else str(rows).encode()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with its SHA-256 in front; after a crash at any point `path` is the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote, or None if there is nothing; a damaged file is set aside with a warning."""
    if not path.exists():
        return None
    try:
        return _read(path)
    except _DamagedError as error:
        taken = {other.name for other in path.parent.iterdir()}
        aside = next(name for n in range(1, 10_000) if (name := f"refused-{n}-{path.name}") not in taken)
        path.rename(path.with_name(aside))
        log.warning(
            "checkpoint refused and kept as %s: %s. Training starts from the beginning.", path.with_name(aside), error
        )
        return None


class _DamagedError(Exception):
    """Says what is wrong with a checkpoint file."""


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    start = len(_MAGIC) + 65
    if not content.startswith(_MAGIC) or len(content) <= start:
        raise _DamagedError(f"{path} is cut short or no checkpoint of a part")
    expected, payload = content[len(_MAGIC) : start - 1].decode("ascii", "replace"), content[start:]
    actual = hashlib.sha256(payload).hexdigest()
    if actual != expected:
        raise _DamagedError(f"{path} has SHA-256 {actual} where {expected} was written")
    return dict(torch.load(io.BytesIO(payload), weights_only=True))
