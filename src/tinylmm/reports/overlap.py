"""Whether a run was asked about images that it was trained on. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylmm.evaluation.overlap import annotated_images, overlapping_images
from tinylmm.reports.collect import images_folder, read_json, read_jsonl
from tinylmm.reports.records import Evaluation, RunRecord


def find_overlaps(store: Path, run: RunRecord) -> list[dict[str, Any]]:
    """One row a benchmark: how many of its images are, byte for byte, among those that the run's stages trained on.

    Returns:
        `{"run", "benchmark", "asked", "trained", "overlapping", "pairs"}`; pairs are (asked file, trained file).

    Raises:
        DataError: the training data is not where the run found it.
        IntegrityError: a file of the store cannot be read.
    """
    trained = _trained_images(store, run)
    rows = []
    for evaluation in {evaluation.benchmark: evaluation for evaluation in run.evaluations}.values():
        asked = _asked_images(store, evaluation)
        pairs = overlapping_images(trained, asked)
        row = {"run": run.name, "benchmark": evaluation.benchmark, "asked": len(asked), "trained": len(trained)}
        rows.append({**row, "overlapping": len(pairs), "pairs": [[str(a), str(b)] for a, b in pairs]})
    return rows


def _trained_images(store: Path, run: RunRecord) -> list[Path]:
    """Images of every source that one of the run's stages was prepared from."""
    images: dict[Path, None] = {}
    for stage in run.stages:
        if stage.kind != "prepare" or stage.folder is None:
            continue
        spec = read_json(stage.folder / "spec.json")
        location = spec["settings"]["location"]
        root = location["root"]
        if root is None:
            root = store / "stages" / f"data-{spec['parents']['data'][:16]}" / "output"
        source = location["source"]
        images |= dict.fromkeys(annotated_images(Path(root), source["annotations"], source["images"]))
    return list(images)


def _asked_images(store: Path, evaluation: Evaluation) -> list[Path]:
    """Image files of a benchmark; cells of parquet files are no files and are left out."""
    folder = images_folder(store, evaluation.generations.parent.parent)
    if folder is None:
        return []
    records = (record for row in read_jsonl(evaluation.generations) for record in row.get("images") or ())
    return list(dict.fromkeys(folder / record["path"] for record in records if record.get("row") is None))
