"""Reads runs and the stages they point at from a store into plain records. No torch.

A report is asked for when something went wrong, too, so a run that failed or still runs and a stage that was deleted
are all readable: what is missing becomes a note on the report. Files that contradict each other are still an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError, UserError, suggestion
from tinylmm.evaluation.protocol import Protocol
from tinylmm.reports.records import Answer, Evaluation, Example, Report, RunReport, Score, StageReport
from tinylmm.reports.stored import (
    Generation,
    choose_generations,
    read_generations,
    read_json,
    read_jsonl,
    read_stored_spec,
)
from tinylmm.store.certificates import find_certificate
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

EVALUATIONS = ("eval", "judge")
"""Kinds of the stages that leave scores."""
ENDED = ("done", "waiting")
"""Of runs that have all the scores they can have."""
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
    finished = [(run.finished, run.name, run.folder) for run in runs if run.status in ENDED and run.finished]
    if not finished:
        states = ", ".join(f"{run.name} ({run.status})" for run in reversed(runs))
        raise UserError(f"no run has finished yet: {states}. Name one to see how far it came: `tinylmm report NAME`.")
    return max(finished)[2]


def _collect_run(store_root: Path, folder: Path) -> RunReport:
    record = read_run(folder)
    notes: list[str] = []
    stages = tuple(_collect_stage(StoreLayout(store_root), row, notes) for row in record.stages)
    models = {stage.digest: stage.name for stage in stages if stage.kind == TRAIN}
    judged, waiting = _judgements(stages)
    evaluations = tuple(
        _collect_evaluation(stage, stage.folder, models, record.spec)
        for stage in stages
        if stage.kind in EVALUATIONS and stage.folder is not None and stage.finished and stage.digest not in judged
    )
    if not evaluations:
        notes.append("No evaluation has finished, so there are no scores.")
    notes += [_unjudged(*stage.name.split("@")) for stage in waiting]
    unjudged = {stage.name for stage in waiting}
    notes += [_unscored(one) for one in evaluations if not one.scores and f"{one.name}@{one.stage}" not in unjudged]
    others = [one.stage for one in evaluations if one.stage not in models.values()]  # models from outside the store
    examples = _collect_examples(store_root, [*models.values(), *others], evaluations)
    return RunReport(record, stages, evaluations, examples, tuple(notes))


def _judgements(stages: Sequence[StageReport]) -> tuple[set[str], list[StageReport]]:
    """Digests of the answers that a judge has scored (its figures then stand for them), and the judgements still to come."""
    judges = [stage for stage in stages if stage.kind == "judge"]
    done = [stage.folder for stage in judges if stage.finished and stage.folder is not None]
    return {read_stored_spec(folder).parents["answers"] for folder in done}, [s for s in judges if not s.finished]


def _unjudged(name: str, model: str) -> str:
    how = f"eval.{name}.judge.base_url and .model"
    return (
        f"{name} after {model} has not been judged; the command below with {how} set judges the answers that are kept."
    )


def _unscored(evaluation: Evaluation) -> str:
    if read_json(evaluation.folder / OUTPUT_FOLDER / SCORES_FILE).get("counts", {}).get("unjudged"):
        return _unjudged(evaluation.name, evaluation.stage)
    what = f"{evaluation.name} after {evaluation.stage} has no figure: the right answers are not in its files."
    if evaluation.upload is None:
        return what
    return f"{what} Its server gives the score to whoever uploads {evaluation.upload}."


def _collect_stage(layout: StoreLayout, row: StageRow, notes: list[str]) -> StageReport:
    finished, work = layout.stage(row.key), layout.work_on(row.key)
    folder = next((path for path in (finished, work) if path.is_dir()), None)
    if row.finished and folder != finished:
        notes.append(f"Stage {row.name} ({row.key}) has been deleted from the store; the command below makes it again.")
        folder = None
    manifest = read_json(folder / MANIFEST_FILE) if folder and (folder / MANIFEST_FILE).exists() else {}
    summary = manifest.get("summary", {})
    notes += [f"Stage {row.name}: {remark}." for remark in summary.get("remarks", ())]
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
        certificate=find_certificate(layout.root, row.digest, manifest.get("versions", {}))
        if row.kind == TRAIN
        else None,
        launched=summary.get("launched", {}),
        kept={name: summary[name] for name in ("pixels", "features") if name in summary},
    )


def _collect_evaluation(stage: StageReport, folder: Path, models: dict[str, str], run: Mapping[str, Any]) -> Evaluation:
    model = read_stored_spec(folder).parents.get("model")
    if model is not None and model not in models:
        raise IntegrityError(
            f"{folder / SPEC_FILE}: evaluates model {model[:16]}, which no training stage of this run made"
        )
    path = folder / OUTPUT_FOLDER / SCORES_FILE
    record = read_json(path)
    name, _, evaluated = stage.name.partition("@")
    protocol = Protocol.of_json(record.get("protocol"), record["benchmark"])
    protocol = replace(protocol, own=_left_to_model(run, protocol, name))
    scores = []
    for row in record["metrics"]:
        if not isfinite(row["value"]):
            raise IntegrityError(f"{path}: {row['metric']} is {row['value']}, not a number")
        value, blind, chance = float(row["value"]), row.get("blind"), row.get("chance")
        low_high = row.get("interval")
        bounds = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        figures = (value, blind, chance, int(row["count"]), bounds, row.get("blind_p"), row.get("top"))
        scores.append(Score(record["benchmark"], row["metric"], *figures, name, protocol))
    return Evaluation(
        evaluated if model is None else models[model], name, record["benchmark"], protocol, tuple(scores), folder
    )


def _left_to_model(run: Mapping[str, Any], protocol: Protocol, name: str) -> tuple[str, ...]:
    """Which of template and frames a run's evaluation asks each model in its own way."""
    asked = run.get("eval", {}).get(name)
    if asked is None:
        return ()
    open_ = {"template": asked.get("template") == "auto", "frames": asked.get("sampling") is None}
    return tuple(field for field, left in open_.items() if left and getattr(protocol, field) is not None)


# ---------------------------------------------------------------------------------------------------- examples


def _collect_examples(
    store_root: Path, train_stages: list[str], evaluations: Sequence[Evaluation]
) -> dict[str, tuple[Example, ...]]:
    """For each evaluation, questions balanced over categories and right and wrong, with what every model said."""
    ordered = sorted(evaluations, key=lambda evaluation: train_stages.index(evaluation.stage))
    by_name: dict[str, list[Evaluation]] = {}
    for evaluation in ordered:
        by_name.setdefault(evaluation.name, []).append(evaluation)
    limit = max(EXAMPLES_A_PAGE // max(len(by_name), 1), MIN_EXAMPLES_A_BENCHMARK)
    return {name: _examples(store_root, group, limit) for name, group in by_name.items()}


def _examples(store_root: Path, evaluations: list[Evaluation], limit: int) -> tuple[Example, ...]:
    *before, last = evaluations
    chosen = choose_generations(read_generations(last.generations), limit)
    earlier: dict[str, list[Answer]] = {one.item_id: [] for one in chosen}
    for evaluation in before:
        for one in read_generations(evaluation.generations):
            if one.item_id in earlier:
                earlier[one.item_id].append(_answer(evaluation, one))
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
                answer=_answer(last, one),
                earlier=tuple(others),
            )
        )
    return tuple(examples)


def _answer(evaluation: Evaluation, one: Generation) -> Answer:
    top, score = evaluation.protocol.top, one.score
    grade = ""
    if score is not None and (top > 1 or 0 < score < 1):
        grade = f"{score:.3g} of {top:g}" if score >= 0 else "the judge's rating could not be read"
    return Answer(evaluation.stage, one.text, one.correct, grade)
