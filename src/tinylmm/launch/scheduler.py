"""Which stage of a graph runs next: for now, all in their order, each after its parents."""

from __future__ import annotations

from collections.abc import Iterator

from tinylmm.planning.graph import StageGraph
from tinylmm.store.stage import Stage


def in_order(graph: StageGraph) -> Iterator[tuple[str, Stage]]:
    """Yield the stages as they are to run, each with its title: "stage 3 of 9: train finetune"."""
    for number, stage in enumerate(graph, 1):
        yield f"stage {number} of {len(graph)}: {stage.kind} {stage.name}", stage
