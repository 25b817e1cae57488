"""Whether a run was asked about images that it was trained on. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylmm.evaluation.overlap import annotated_images, overlapping_images
from tinylmm.reports.records import Evaluation, RunReport
from tinylmm.reports.stored import read_generations, read_stored_spec


@dataclass(frozen=True)
class Overlap:
    """How many images of one benchmark are, byte for byte, among those that a run trained on.

    Attributes:
        asked, trained: different images that the run was asked about, and trained on.
        pairs: (asked file, trained file) for each image that is both.
    """

    run: str
    benchmark: str
    asked: int
    trained: int
    pairs: tuple[tuple[Path, Path], ...]

    def as_json(self) -> dict[str, Any]:
        """The JSON of `tinylmm report --overlap --json`."""
        row = {"run": self.run, "benchmark": self.benchmark, "asked": self.asked, "trained": self.trained}
        return {**row, "overlapping": len(self.pairs), "pairs": [[str(a), str(b)] for a, b in self.pairs]}


def find_overlaps(store: Path, run: RunReport) -> list[Overlap]:
    """One row a benchmark that the run was evaluated on.

    Raises:
        DataError: the training data is not where the run found it.
        IntegrityError: a file of the store cannot be read.
    """
    trained = _trained_images(store, run)
    rows = []
    for evaluation in run.last_evaluations.values():
        asked = _asked_images(store, evaluation)
        pairs = tuple(overlapping_images(trained, asked))
        rows.append(Overlap(run.name, evaluation.name, len(asked), len(trained), pairs))
    return rows


def _trained_images(store: Path, run: RunReport) -> list[Path]:
    """Images of every source that one of the run's stages was prepared from."""
    images: dict[Path, None] = {}
    for stage in run.stages:
        if stage.kind != "prepare" or stage.folder is None:
            continue
        spec = read_stored_spec(stage.folder)
        if (root := spec.source_root(store)) is not None:
            images |= dict.fromkeys(annotated_images(root, spec.annotations, spec.images))
    return list(images)


def _asked_images(store: Path, evaluation: Evaluation) -> list[Path]:
    """Image files of a benchmark; cells of parquet files are no files and are left out."""
    folder = read_stored_spec(evaluation.folder).images_folder(store)
    if folder is None:
        return []
    refs = (ref for one in read_generations(evaluation.generations) for ref in one.images)
    return list(dict.fromkeys(folder / ref.path for ref in refs if ref.row is None))
