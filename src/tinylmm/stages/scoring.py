"""From kept answers to figures: what the stages that ask and those that judge have in common.

Scoring reads questions and answers and nothing else, so answers that lie in the store are scored, or judged, at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, ImageRef, Item, Scores
from tinylmm.evaluation.benchmarks.registry import get_benchmark
from tinylmm.evaluation.images import cluster_of
from tinylmm.evaluation.protocol import Protocol, protocol_of
from tinylmm.evaluation.sampling import sampled
from tinylmm.evaluation.score_rows import score_rows
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.specs import AskedStage, JudgeStage
from tinylmm.stages.job import StageJob
from tinylmm.store.layout import GENERATIONS_FILE, SCORES_FILE
from tinylmm.store.stage import digest

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

log = logging.getLogger(__name__)

MODES = ("image", "blind")
GENERATED = ("prompt_tokens", "new_tokens", "latency_s", "batch")
"""Of an answer, how it came about."""
UNREADABLE = "unreadable"
"""Of a row that is no answer: what is wrong with an image or video of its question."""
PROMPT = "prompt"
"""Of an answer, what was asked where that is not the item's prompt."""

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
"""(mode, item id) -> an answer as it was kept: `text`, and how it was generated."""


@dataclass(frozen=True)
class Asked:
    """A benchmark's questions with their answers.

    Attributes:
        benchmark: whose questions.
        items: those that were asked, of `total`.
        keys: which of their images are the same, as `content_keys` finds them.
        rows: the answers.
        how: counts and times of asking, for the summary.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    total: int
    keys: Mapping[str, str]
    rows: Rows
    how: Mapping[str, Any]

    def answers(self, mode: str) -> dict[str, Answer]:
        """Item id -> what was answered in one mode."""
        return {
            item_id: Answer(row["text"])
            for (asked, item_id), row in self.rows.items()
            if asked == mode and UNREADABLE not in row
        }

    @property
    def unreadable(self) -> int:
        """Questions about an image or video that could not be read."""
        return sum(UNREADABLE in row for row in self.rows.values())


def read_items(job: StageJob[AskedStage]) -> tuple[Benchmark, list[Item], int]:
    """The benchmark, the questions to ask, from its own files or from a source of a data set, and how many there are."""
    (location,), spec = job.locations, job.spec
    root = job.root_of(location)
    benchmark = get_benchmark(spec.benchmark, job.settings.trust, **spec.options)
    if spec.source is None:
        items = benchmark.load(root, spec.layout)
    else:
        source = location.source
        assert source.annotations is not None  # a source of a data set has a file
        folder = root / source.images
        items = benchmark.load_source(root / source.annotations, folder, source.limit, source.follow_links)
        items = [_upright(item) for item in items] if source.orientation == "apply" else items
    return benchmark, sampled(benchmark, items, spec.limit, spec.limit_seed), len(items)


def _upright(item: Item) -> Item:
    """The same question with its images turned as their cameras say."""
    return replace(item, images=tuple(replace(ref, upright=True) for ref in item.images))


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers in a generations.jsonl that `write_scores` wrote."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            kept = ("text", *GENERATED, *filter(line.__contains__, (UNREADABLE, PROMPT)))
            rows["image", line["item_id"]] = {key: line[key] for key in kept}
            if line["blind_text"] is not None:
                rows["blind", line["item_id"]] = {"text": line["blind_text"]}
    return rows


def write_scores(job: StageJob[AskedStage], asked: Asked, judge: Judge | None = None) -> dict[str, Any]:
    """Write output/generations.jsonl and output/scores.json; returns the summary, with the metrics.

    A benchmark that only a judge can score has no metric without one.
    """
    benchmark, items, variant = asked.benchmark, asked.items, job.spec.variant
    answers = asked.answers("image")
    scores = benchmark.score(items, answers, variant, judge)
    blind = benchmark.score(items, asked.answers("blind"), variant, judge) if job.spec.blind else None
    metrics = score_rows(benchmark, items, answers, scores, blind, asked.keys, judge is not None)
    protocol = _protocol(job, asked, scores)
    _write_generations(job, asked, scores, blind)
    record = {
        "benchmark": benchmark.name,
        "protocol": protocol.as_json(),
        "variant": scores.variant,
        "model_digest": _model_digest(job),
        "metrics": metrics,
        **{key: value for key, value in scores.as_json().items() if key not in ("benchmark", "variant")},
        "generation": dict(asked.how),
    }
    if asked.unreadable:
        record["counts"] = record["counts"] | {UNREADABLE: asked.unreadable}
    (job.output / SCORES_FILE).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    summary = {"protocol": protocol.name, "metrics": metrics, "questions": len(items)}
    summary |= {"images": len(set(asked.keys.values())), **asked.how}
    if asked.unreadable:
        what = f"images or videos of {asked.unreadable:,} of {len(items):,} questions could not be read"
        summary["remarks"] = [f"{what}, which count as not answered (faults.jsonl names them)"]
    return summary


def _model_digest(job: StageJob[AskedStage]) -> str:
    """Key of the stage that made the model; of a model from elsewhere the digest of its content."""
    if job.spec.model is None:
        return job.parents["model"].parent.name
    return digest(job.spec.model.content)


def _protocol(job: StageJob[AskedStage], asked: Asked, scores: Scores) -> Protocol:
    (location,), spec, benchmark = job.locations, job.spec, asked.benchmark
    judged = spec if isinstance(spec, JudgeStage) and "judge_requests" in scores.counts else None
    return protocol_of(
        benchmark,
        scores.variant,
        asked.items,
        asked.total,
        spec.options,
        split=benchmark.chosen_split(job.root_of(location), spec.layout) if spec.source is None else None,
        layout=spec.layout,
        limit=spec.limit,
        seed=spec.limit_seed,
        template=spec.template,
        max_new_tokens=spec.max_new_tokens,
        precision=spec.precision,
        frames=" of ".join(filter(None, (spec.frames, asked.how.get("frames")))) or None,
        judge=judged.judge if judged else None,
        judge_runs=judged.judge_runs if judged else 1,
        code=KINDS["eval"].version,
    )


def write_upload(job: StageJob[AskedStage], asked: Asked) -> None:
    """Write output/upload.* where the benchmark has a server and these questions are its."""
    benchmark = asked.benchmark
    if not benchmark.upload:
        return
    path = job.output / f"upload.{benchmark.upload}"
    try:
        benchmark.write_submission(asked.items, asked.answers("image"), path)
    except (ConfigError, DataError) as error:
        # scored locally, or the server's own list is not at hand: no fault of the run
        path.unlink(missing_ok=True)
        log.warning("no upload file for %s: %s", benchmark.name, error)


def _write_generations(job: StageJob[AskedStage], asked: Asked, scores: Scores, blind: Scores | None) -> None:
    """One line an item in the order of the question file; `question_id`, `prompt` and `text` as in LLaVA's answer files."""
    folder, benchmark = _image_folder(job), asked.benchmark
    score_of = {row.item_id: row.score for row in scores.per_item}
    headline = scores.bases.get(benchmark.headline)
    grouped = headline is not None and headline.grouped and headline.values is not None
    blind_score_of = {row.item_id: row.score for row in blind.per_item} if blind else {}
    with (job.output / GENERATIONS_FILE).open("w", encoding="utf-8") as file:
        for item in asked.items:
            answer, unseen = asked.rows["image", item.item_id], asked.rows.get(("blind", item.item_id))
            score, blind_score = score_of[item.item_id], blind_score_of.get(item.item_id)
            line = {
                "item_id": item.item_id,
                "question_id": item.question_id,
                "image": _image_name(item.images[0], folder) if item.images else "",
                "images": [_image_record(ref, folder) for ref in item.images],
                "cluster": hashlib.sha256(cluster_of(item, asked.keys).encode()).hexdigest()[:16],
                **({"group": benchmark.group_of(item)} if grouped else {}),
                "category": item.category,
                "prompt": answer.get(PROMPT, item.prompt),
                "truth": benchmark.truth(item),
                "text": answer["text"],
                "score": score,
                "correct": benchmark.correct(score),
                "blind_text": unseen["text"] if unseen else None,
                "blind_score": blind_score,
                "blind_correct": benchmark.correct(blind_score),
                "options": item.options,
                **{key: answer[key] for key in GENERATED},
                **({UNREADABLE: answer[UNREADABLE]} if UNREADABLE in answer else {}),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _image_folder(job: StageJob[AskedStage]) -> Path:
    (location,) = job.locations
    return (job.root_of(location) / location.source.images).resolve()


def _image_name(ref: ImageRef, folder: Path) -> str:
    """Path below `folder`, where the report looks for it; absolute where the image lies elsewhere."""
    path = ref.path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _image_record(ref: ImageRef, folder: Path) -> dict[str, Any]:
    cell = {} if ref.row is None else {"row": ref.row, "column": ref.column}
    clip = {"video": True} | ({} if ref.part is None else {"part": list(ref.part)}) if ref.video else {}
    return {"path": _image_name(replace(ref, data=None), folder), **cell, **clip}
