"""Where TensorBoard and Weights & Biases write; transformers' own callbacks do the logging."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylmm.config.spec import TrackingSpec
from tinylmm.store.layout import OUTPUT_FOLDER
from tinylmm.training.ranks import rank

log = logging.getLogger(__name__)


def configure_tensorboard(folder: Path) -> None:
    """Let TensorBoard's callback write to a stage's output; it reads the environment."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / OUTPUT_FOLDER / "tensorboard")


@contextmanager
def wandb_run(tracking: TrackingSpec, folder: Path, name: str) -> Iterator[None]:
    """While the block runs, rank 0 has a run on Weights & Biases, if it is asked for; transformers' callback logs to it.

    It works offline where no key is to be had from the environment or ~/.netrc: `wandb sync` uploads later.

    Args:
        tracking: the run's tracking fields.
        folder: for files of Weights & Biases: outside the stage, since they hold links, which are never published.
        name: what the run is called on its page.
    """
    if not tracking.wandb.enabled or rank() != 0:
        yield
        return
    os.environ |= {"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false", "WANDB_SILENT": "true"}
    if "WANDB_MODE" not in os.environ and not _has_key():
        log.warning(
            "no Weights & Biases key in WANDB_API_KEY or ~/.netrc: it works offline; upload later with `wandb sync`"
        )
        os.environ["WANDB_MODE"] = "offline"
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    wandb.init(project=tracking.wandb.project, entity=tracking.wandb.entity, name=name, dir=str(folder))
    try:
        yield
    finally:
        wandb.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
