"""The kinds of stages: one row a kind says all that the rest of the package needs to know of it. No torch.

A new kind is a row here, its spec in `planning/specs.py`, and its body: a module with `run(job) -> summary`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinylmm.config.identities import Recorded
from tinylmm.planning.specs import DataStage, EvalStage, ImagesStage, JudgeStage, PartsStage, PrepareStage, TrainStage


@dataclass(frozen=True)
class Kind:
    """What a kind of stages is.

    Attributes:
        spec: what decides a stage's result.
        version: raised by hand when a change of code changes what a stage of this kind produces; older results are then
            not reused.
        body: module with `run(job)`; `import_body` loads it where a stage is run, since most of them load torch.
        uses_ranks: whether it runs on every rank of the launch; others run in the command's own process.
        scratch: names in the work folder, besides checkpoints, that are deleted when the stage is done.
        curve: what a report calls the curve in metrics.jsonl; None where there is none to draw.
        length: how long a stage of the kind takes beside others, roughly; only the order of stages hangs on it.
    """

    spec: type[Recorded]
    version: int
    body: str
    uses_ranks: bool = False
    scratch: tuple[str, ...] = ()
    curve: str | None = None
    length: float = 1.0


KINDS = {
    "data": Kind(DataStage, 2, "tinylmm.stages.data"),
    "parts": Kind(PartsStage, 1, "tinylmm.stages.parts", curve="loss", length=5.0),
    "images": Kind(ImagesStage, 1, "tinylmm.stages.images", scratch=("scratch",)),
    "prepare": Kind(PrepareStage, 3, "tinylmm.stages.prepare", scratch=("scratch",)),
    "train": Kind(
        TrainStage,
        2,
        "tinylmm.stages.train",
        uses_ranks=True,
        scratch=("features.part", "kept"),
        curve="loss",
        length=20.0,
    ),
    "eval": Kind(
        EvalStage, 3, "tinylmm.stages.evaluate", uses_ranks=True, scratch=("answers", "features.part"), length=4.0
    ),
    "judge": Kind(JudgeStage, 1, "tinylmm.stages.judging", length=2.0),
}
"""Kind -> what it is; the names stand in digests and folder names."""
