"""Reads runs and the stages they point at from a store into plain records. No torch.

A report is asked for when something went wrong, too, so a run that failed or still runs and a stage that was deleted
are all readable: what is missing becomes a note on the report. Files that contradict each other are still an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from tinylmm.errors import IntegrityError, UserError, suggestion
from tinylmm.reports.records import Answer, Evaluation, Example, Report, RunReport, Score, StageReport
from tinylmm.reports.stored import choose_generations, read_generations, read_json, read_jsonl, read_stored_spec
from tinylmm.store.layout import (
    ERROR_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    OUTPUT_FOLDER,
    RUN_FILE,
    SCORES_FILE,
    SPEC_FILE,
    StoreLayout,
)
from tinylmm.store.runs import TRAIN, StageRow, read_run, read_runs

log = logging.getLogger(__name__)

EXAMPLES_A_PAGE = 24
MIN_EXAMPLES_A_BENCHMARK = 6
MAX_ERROR_CHARS = 20_000


def collect_report(store_root: Path, runs: Sequence[str] | None = None) -> Report:
    """Read the named runs, or the newest finished one where no name is given.

    Raises:
        UserError: no such store or run, no run at all, or none that has finished.
        IntegrityError: a file of the store cannot be read, or contradicts another.
    """
    layout = StoreLayout(store_root)
    folders = {path.parent.name: path.parent for path in sorted(layout.runs.glob(f"*/{RUN_FILE}"))}
    if not folders:
        raise UserError(
            f"no runs in the store {store_root} (looked for {layout.run('*') / RUN_FILE}). "
            "Start one with `tinylmm-train`, or point --store at the store that has them."
        )
    if not runs:
        return Report(store_root, (_collect_run(store_root, _newest_finished(store_root)),))
    for name in runs:
        if name not in folders:
            known = ", ".join(sorted(folders))
            hint = suggestion(name, folders)
            raise UserError(f"no run named '{name}' in {layout.runs}. {hint}\nRuns there: {known}".replace(" \n", "\n"))
    return Report(store_root, tuple(_collect_run(store_root, folders[name]) for name in dict.fromkeys(runs)))


def _newest_finished(store_root: Path) -> Path:
    runs = read_runs(store_root)
    for run in runs:
        if run.status == "unreadable":
            log.warning("Run %s is left out of the search for the newest one: %s", run.name, run.problem)
    finished = [(run.finished, run.name, run.folder) for run in runs if run.status == "done" and run.finished]
    if not finished:
        states = ", ".join(f"{run.name} ({run.status})" for run in reversed(runs))
        raise UserError(f"no run has finished yet: {states}. Name one to see how far it came: `tinylmm report NAME`.")
    return max(finished)[2]


def _collect_run(store_root: Path, folder: Path) -> RunReport:
    record = read_run(folder)
    notes: list[str] = []
    stages = tuple(_collect_stage(StoreLayout(store_root), row, notes) for row in record.stages)
    models = {stage.digest: stage.name for stage in stages if stage.kind == TRAIN}
    evaluations = tuple(
        _collect_evaluation(stage, stage.folder, models)
        for stage in stages
        if stage.kind == "eval" and stage.folder is not None and stage.finished
    )
    if not evaluations:
        notes.append("No evaluation has finished, so there are no scores.")
    examples = _collect_examples(store_root, list(models.values()), evaluations)
    return RunReport(record, stages, evaluations, examples, tuple(notes))


def _collect_stage(layout: StoreLayout, row: StageRow, notes: list[str]) -> StageReport:
    finished, work = layout.stage(row.key), layout.work_on(row.key)
    folder = next((path for path in (finished, work) if path.is_dir()), None)
    if row.finished and folder != finished:
        notes.append(f"Stage {row.name} ({row.key}) has been deleted from the store; the command below makes it again.")
        folder = None
    manifest = read_json(folder / MANIFEST_FILE) if folder and (folder / MANIFEST_FILE).exists() else {}
    notes += [f"Stage {row.name}: {remark}." for remark in manifest.get("summary", {}).get("remarks", ())]
    error_file = work / ERROR_FILE
    error = error_file.read_text(encoding="utf-8", errors="replace") if error_file.exists() else None
    return StageReport(
        row.kind,
        row.name,
        row.digest,
        row.key,
        row.status,
        row.seconds if row.status == "run" else manifest.get("seconds", row.seconds),
        folder=folder,
        metrics=tuple(read_jsonl(folder / METRICS_FILE)) if folder else (),
        peak_rss_mib=manifest.get("peak_rss_mib"),
        error=error.strip()[-MAX_ERROR_CHARS:] if error and row.status == "failed" else None,
    )


def _collect_evaluation(stage: StageReport, folder: Path, models: dict[str, str]) -> Evaluation:
    model = read_stored_spec(folder).parents["model"]
    if model not in models:
        raise IntegrityError(
            f"{folder / SPEC_FILE}: evaluates model {model[:16]}, which no training stage of this run made"
        )
    path = folder / OUTPUT_FOLDER / SCORES_FILE
    record = read_json(path)
    scores = []
    for row in record["metrics"]:
        if not isfinite(row["value"]):
            raise IntegrityError(f"{path}: {row['metric']} is {row['value']}, not a number")
        value, blind, chance = float(row["value"]), row.get("blind"), row.get("chance")
        low_high = row.get("interval")
        bounds = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        scores.append(Score(record["benchmark"], row["metric"], value, blind, chance, int(row["count"]), bounds))
    protocol = str(record.get("protocol") or "")
    return Evaluation(models[model], record["benchmark"], protocol, tuple(scores), folder)


# ---------------------------------------------------------------------------------------------------- examples


def _collect_examples(
    store_root: Path, train_stages: list[str], evaluations: Sequence[Evaluation]
) -> dict[str, tuple[Example, ...]]:
    """For each benchmark, questions balanced over categories and right and wrong, with what every model said."""
    ordered = sorted(evaluations, key=lambda evaluation: train_stages.index(evaluation.stage))
    by_benchmark: dict[str, list[Evaluation]] = {}
    for evaluation in ordered:
        by_benchmark.setdefault(evaluation.benchmark, []).append(evaluation)
    limit = max(EXAMPLES_A_PAGE // max(len(by_benchmark), 1), MIN_EXAMPLES_A_BENCHMARK)
    return {name: _examples(store_root, group, limit) for name, group in by_benchmark.items()}


def _examples(store_root: Path, evaluations: list[Evaluation], limit: int) -> tuple[Example, ...]:
    *before, last = evaluations
    chosen = choose_generations(read_generations(last.generations), limit)
    earlier: dict[str, list[Answer]] = {one.item_id: [] for one in chosen}
    for evaluation in before:
        for one in read_generations(evaluation.generations):
            if one.item_id in earlier:
                earlier[one.item_id].append(Answer(evaluation.stage, one.text, one.correct))
    source = read_stored_spec(last.folder)
    folder = source.images_folder(store_root)
    examples = []
    for one in chosen:
        others = earlier[one.item_id]
        if one.blind_text is not None:
            others.append(Answer("blind", one.blind_text, one.blind_correct))
        examples.append(
            Example(
                question_id=one.question_id,
                category=one.category,
                question=one.question,
                truth=one.truth,
                image_name=one.image_name,
                image=one.first_image(folder, source),
                answer=Answer(last.stage, one.text, one.correct),
                earlier=tuple(others),
            )
        )
    return tuple(examples)
