"""Where TensorBoard and Weights & Biases write, by the environment variables that transformers' own callbacks read."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tinylmm.config.spec import TrackingSpec
from tinylmm.store.layout import OUTPUT_FOLDER

log = logging.getLogger(__name__)


def configure_trackers(tracking: TrackingSpec, folder: Path, name: str) -> None:
    """Set the trackers' environment for one stage.

    Args:
        tracking: the run's tracking fields.
        folder: the stage's work folder; everything that trackers write goes below it.
        name: what the stage is called on the tracker's page.

    Weights & Biases works offline where no key is to be had from the environment or ~/.netrc: `wandb sync` uploads later.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / OUTPUT_FOLDER / "tensorboard")
    wandb = tracking.wandb
    if not wandb.enabled:
        return
    os.environ |= {"WANDB_PROJECT": wandb.project, "WANDB_DIR": str(folder / OUTPUT_FOLDER), "WANDB_NAME": name}
    os.environ |= {"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"}
    if wandb.entity:
        os.environ["WANDB_ENTITY"] = wandb.entity
    if "WANDB_MODE" not in os.environ and not _has_key():
        log.warning(
            "no Weights & Biases key in WANDB_API_KEY or ~/.netrc: it works offline; upload later with `wandb sync`"
        )
        os.environ["WANDB_MODE"] = "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
