"""Runs a stage in this process."""

from __future__ import annotations

import gc
import sys
from typing import Any

from tinylmm.config.launch import LaunchSpec
from tinylmm.launch.worker import quiet_libraries
from tinylmm.stages import import_body
from tinylmm.stages.job import StageJob

WITHOUT_MODEL = ("data", "images", "prepare", "judge")
"""Kinds of stages that leave no model behind: to look for one in all that the libraries hold takes half a second."""


class Backend:
    """See `LaunchBackend`; `start` returns when the stage is done."""

    def __init__(self, launch: LaunchSpec) -> None:
        self._summary: dict[str, Any] | None = None

    def start(self, job: StageJob[Any]) -> None:
        """Run the stage's body."""
        quiet_libraries()
        run = import_body(job.kind)
        try:
            self._summary = run(job)
        finally:
            if job.kind not in WITHOUT_MODEL:
                _let_go()

    def poll(self) -> dict[str, Any] | None:
        """Return the summary."""
        return self._summary

    def stop(self, now: bool = False) -> None:
        """Nothing to do: the body itself asks `stop_requested`, and has ended when this can be called."""


def _let_go() -> None:
    """Free what a stage held, before the next one loads a model beside it: a trainer and its callbacks hold each other."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
