"""Reads runs and the stages they point at from a store into plain records. No torch.

A report is asked for when something went wrong, too, so a run that failed or still runs and a stage that was deleted
are all readable: what is missing becomes a note on the report. Files that contradict each other are still an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from heapq import heappush, heapreplace
from math import isfinite
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError, UserError, suggestion
from tinylmm.reports.records import Answer, Evaluation, Example, Report, RunRecord, Score, StageRecord

log = logging.getLogger(__name__)

RUN_FORMAT = 1
EXAMPLES_A_PAGE = 24
MIN_EXAMPLES_A_BENCHMARK = 6
MAX_ERROR_CHARS = 20_000


def collect_report(store_root: Path, runs: Sequence[str] | None = None) -> Report:
    """Read the named runs, or the newest finished one where no name is given.

    Raises:
        UserError: no such store or run, no run at all, or none that has finished.
        IntegrityError: a file of the store cannot be read, or contradicts another.
    """
    folders = _run_folders(store_root)
    if not runs:
        return Report(store_root, (_collect_run(store_root, _newest_finished(folders)),))
    for name in runs:
        if name not in folders:
            known = ", ".join(sorted(folders))
            hint = suggestion(name, folders)
            raise UserError(
                f"no run named '{name}' in {store_root / 'runs'}. {hint}\nRuns there: {known}".replace(" \n", "\n")
            )
    return Report(store_root, tuple(_collect_run(store_root, folders[name]) for name in dict.fromkeys(runs)))


def _run_folders(store_root: Path) -> dict[str, Path]:
    found = sorted((store_root / "runs").glob("*/run.json"))
    if not found:
        raise UserError(
            f"no runs in the store {store_root} (looked for {store_root}/runs/*/run.json). "
            "Start one with `tinylmm-train`, or point --store at the store that has them."
        )
    return {path.parent.name: path.parent for path in found}


def _newest_finished(folders: dict[str, Path]) -> Path:
    finished: list[tuple[str, Path]] = []
    statuses: dict[str, str] = {}
    for name, folder in folders.items():
        try:
            record = _read_run(folder)
        except IntegrityError as error:
            log.warning("Run %s is left out of the search for the newest one: %s", name, error)
            continue
        statuses[name] = record["status"]
        if record["status"] == "done" and record["finished"]:
            finished.append((record["finished"], folder))
    if not finished:
        states = ", ".join(f"{name} ({status})" for name, status in statuses.items())
        raise UserError(f"no run has finished yet: {states}. Name one to see how far it came: `tinylmm report NAME`.")
    return max(finished, key=lambda pair: (pair[0], pair[1].name))[1]


def _read_run(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "run.json")
    if record.get("format") != RUN_FORMAT:
        raise IntegrityError(
            f"{folder / 'run.json'}: format is {record.get('format')!r}, this version reads {RUN_FORMAT}. "
            "Use the version of tinylmm that wrote it, or run the same command again."
        )
    missing = [key for key in ("status", "created", "finished", "spec", "stages") if key not in record]
    if missing:
        raise IntegrityError(f"{folder / 'run.json'}: {', '.join(missing)} missing. Run the same command again.")
    return record


def _collect_run(store_root: Path, folder: Path) -> RunRecord:
    record = _read_run(folder)
    notes: list[str] = []
    stages = tuple(_collect_stage(store_root, stage, notes) for stage in record["stages"])
    models = {stage.digest: stage.name for stage in stages if stage.kind == "train"}
    evaluations = tuple(
        _collect_evaluation(stage, stage.folder, models)
        for stage in stages
        if stage.kind == "eval" and stage.folder is not None and stage.status in ("run", "reused")
    )
    if not evaluations:
        notes.append("No evaluation has finished, so there are no scores.")
    return RunRecord(
        name=folder.name,
        status=record["status"],
        created=record["created"],
        finished=record["finished"],
        host=record.get("host") or "",
        overrides=tuple(record.get("overrides") or ()),
        spec=record["spec"],
        versions=record.get("versions") or {},
        folder=folder,
        stages=stages,
        evaluations=evaluations,
        examples=_collect_examples(store_root, list(models.values()), evaluations),
        notes=tuple(notes),
    )


def _collect_stage(store_root: Path, record: dict[str, Any], notes: list[str]) -> StageRecord:
    key, status = record["key"], record["status"]
    finished, work = store_root / "stages" / key, store_root / "work" / key
    folder = next((path for path in (finished, work) if path.is_dir()), None)
    if status in ("run", "reused") and folder != finished:
        notes.append(
            f"Stage {record['name']} ({key}) has been deleted from the store; the command below makes it again."
        )
        folder = None
    manifest = read_json(folder / "manifest.json") if folder and (folder / "manifest.json").exists() else {}
    error_file = work / "error.txt"
    error = error_file.read_text(encoding="utf-8", errors="replace") if error_file.exists() else None
    return StageRecord(
        kind=record["kind"],
        name=record["name"],
        digest=record["digest"],
        key=key,
        status=status,
        seconds=record.get("seconds") if status == "run" else manifest.get("seconds", record.get("seconds")),
        folder=folder,
        metrics=tuple(read_jsonl(folder / "metrics.jsonl")) if folder else (),
        summary=manifest.get("summary") or {},
        versions=manifest.get("versions") or {},
        peak_rss_mib=manifest.get("peak_rss_mib"),
        error=error.strip()[-MAX_ERROR_CHARS:] if error and status == "failed" else None,
    )


def _collect_evaluation(stage: StageRecord, folder: Path, models: dict[str, str]) -> Evaluation:
    model = read_json(folder / "spec.json")["parents"]["model"]
    if model not in models:
        raise IntegrityError(
            f"{folder / 'spec.json'}: evaluates model {model[:16]}, which no training stage of this run made"
        )
    record = read_json(folder / "output" / "scores.json")
    scores = []
    for row in record["metrics"]:
        if not isfinite(row["value"]):
            raise IntegrityError(
                f"{folder / 'output' / 'scores.json'}: {row['metric']} is {row['value']}, not a number"
            )
        value, blind, chance = float(row["value"]), row.get("blind"), row.get("chance")
        low_high = row.get("interval")
        bounds = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        scores.append(Score(record["benchmark"], row["metric"], value, blind, chance, int(row["count"]), bounds))
    protocol = str(record.get("protocol") or "")
    return Evaluation(
        models[model], record["benchmark"], protocol, tuple(scores), folder / "output" / "generations.jsonl"
    )


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
    rows = choose_rows(read_jsonl(last.generations), limit)
    wanted = {row_id(row) for row in rows}
    earlier: dict[str, list[Answer]] = {question: [] for question in wanted}
    for evaluation in before:
        for row in read_jsonl(evaluation.generations):
            if row_id(row) in wanted:
                earlier[row_id(row)].append(Answer(evaluation.stage, row["text"], bool(row["correct"])))
    folder = images_folder(store_root, last.generations.parent.parent)
    examples = []
    for row in rows:
        others = earlier[row_id(row)]
        if row.get("blind_text") is not None:
            others.append(Answer("blind", row["blind_text"], bool(row.get("blind_correct"))))
        examples.append(
            Example(
                question_id=str(row["question_id"]),
                category=str(row.get("category") or ""),
                question=str(row.get("question") or row.get("prompt") or ""),
                truth=str(row["truth"]),
                image=str(row.get("image") or ""),
                image_path=_image_path(folder, row.get("image")),
                answer=Answer(last.stage, row["text"], bool(row["correct"])),
                earlier=tuple(others),
            )
        )
    return tuple(examples)


def row_id(row: dict[str, Any]) -> str:
    """What tells a generation from the others: question ids are not unique in every benchmark."""
    return str(row.get("item_id", row["question_id"]))


def choose_rows(rows: Iterator[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Pick up to `limit` generations, balanced over categories, then over right and wrong.

    The order within a group is that of the SHA-256 of the question's id: always the same choice, and nobody's taste.
    Holds `limit` rows a group at most, however long the file.
    """
    groups: dict[tuple[str, bool], list[tuple[int, int, dict[str, Any]]]] = {}
    for index, row in enumerate(rows):
        heap = groups.setdefault((str(row.get("category") or ""), bool(row["correct"])), [])
        rank = int(hashlib.sha256(row_id(row).encode()).hexdigest(), 16)
        if len(heap) < limit:
            heappush(heap, (-rank, -index, row))  # a heap of negated ranks: its head is the first to go
        elif -rank > heap[0][0]:
            heapreplace(heap, (-rank, -index, row))
    queues = {group: [row for _, _, row in sorted(heap, key=lambda item: item[:2])] for group, heap in groups.items()}
    categories = list(dict.fromkeys(category for category, _ in queues))
    chosen: list[tuple[int, dict[str, Any]]] = []
    for turn in range(2 * limit):
        for position, category in enumerate(categories):
            right_first = (turn + position) % 2 == 0
            queue = queues.get((category, right_first)) or queues.get((category, not right_first))
            if queue and len(chosen) < limit:
                chosen.append((position, queue.pop()))
    chosen.sort(key=lambda pair: (pair[0], not pair[1]["correct"]))
    return [row for _, row in chosen]


def images_folder(store_root: Path, eval_folder: Path) -> Path | None:
    """Where the images of an evaluation lie: in its data stage's output, or under the root of outside data."""
    spec = read_json(eval_folder / "spec.json")
    location = (spec.get("settings") or {}).get("location") or {"root": None, "source": spec["spec"]["source"]}
    if location and location["root"] is not None:
        return Path(location["root"]) / location["source"].get("images", "")
    parent = spec["parents"].get("data")
    if parent is None:
        return None
    return store_root / "stages" / f"data-{parent[:16]}" / "output" / location["source"].get("images", "")


def _image_path(folder: Path | None, image: str | None) -> Path | None:
    if folder is None or not image:
        return None
    path = (folder / image).resolve()
    # a record is data, not trusted: its image may not lead out of the folder and put some other file on the page
    return path if path.is_relative_to(folder.resolve()) else None


# ---------------------------------------------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing. Run the same command again to make it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path} is not readable JSON ({error}). Run the same command again to make it."
        ) from error
    if not isinstance(record, dict):
        raise IntegrityError(f"{path} holds a {type(record).__name__}, not an object")
    return record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, none where there is no file; a last line still being written (no line end) is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise IntegrityError(f"{path}, line {number} is not JSON ({error})") from error
