"""What to say of a training that has run out of memory: what the plan predicted, and what would fit."""

from __future__ import annotations

import logging

from tinylmm.errors import StageFailedError, TinyLMMError
from tinylmm.planning.estimates import memory_words
from tinylmm.planning.planner import RunPlan
from tinylmm.store.stage import Stage

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "can't allocate memory", "MemoryError")
"""In the words of torch's CUDA and CPU allocators, and of Python."""


def with_advice(failure: TinyLMMError, plan: RunPlan, stage: Stage) -> TinyLMMError:
    """The failure of a stage; that of a training that has run out of memory ends with the planner's advice."""
    said = str(failure)
    trains = stage.kind == "train" and stage.name in plan.run.recipe.stages
    if not trains or not isinstance(failure, StageFailedError) or not any(words in said for words in OUT_OF_MEMORY):
        return failure
    words = memory_words(plan, stage)
    log.error("%s ran out of memory: %s", stage.name, words)
    advised = StageFailedError(f"{said}\n  Out of memory: {words}")
    advised.__cause__ = failure
    return advised
