"""tinylmm: a declarative experiment runner for small large-multimodal models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinylmm.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from tinylmm.generation.session import ChatModel

__all__ = ["__version__", "load"]


def load(where: str | Path, **options: Any) -> ChatModel:
    """Load a trained model to talk to: `tinylmm.load("store/runs/NAME").chat("What is it?", image="cat.jpg")`.

    Args:
        where: a model folder, a stage or run folder of the store, or the name of a run.
        options: device, dtype, trust, store, attention; see `tinylmm.generation.session.load`.
    """
    from tinylmm.generation.session import load as load_chat_model  # here, as it loads torch

    return load_chat_model(where, **options)
