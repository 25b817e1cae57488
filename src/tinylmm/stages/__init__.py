"""One thin body a kind of stages: `run(job)` does the work and returns a summary for the manifest."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tinylmm.planning.kinds import KINDS


def import_body(kind: str) -> Callable[[Any], dict[str, Any]]:
    """Return the function that runs stages of a kind; loads what it needs, torch mostly."""
    run: Callable[[Any], dict[str, Any]] = import_module(KINDS[kind].body).run
    return run
