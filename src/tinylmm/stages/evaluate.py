"""The `eval` stage: ask a benchmark's questions of a trained model, keep the raw answers, score them.

Asking and scoring are separate. Answers go to work files as they come (a killed stage asks only what it has not answered);
when all are there, output/generations.jsonl holds them in the order of the question file and output/scores.json what they
are worth. Runs on every rank: each answers the questions about its share of the images.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tinylmm.data.chat import get_template
from tinylmm.data.images import ImageTransform
from tinylmm.data.slots import question
from tinylmm.errors import ConfigError, DataError, IntegrityError, UserError
from tinylmm.evaluation.answers import AnswerFile, read_answers, shard
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, ImageRef, Item, Scores
from tinylmm.evaluation.benchmarks.registry import get_benchmark
from tinylmm.evaluation.images import cluster_of, content_keys, first_refs, open_image_ref
from tinylmm.evaluation.score_rows import score_rows
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine, Reply
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.attention import choose_attention
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.devices import DTYPES, choose_device, to_precision
from tinylmm.planning.specs import EvalStage
from tinylmm.stages.job import StageJob
from tinylmm.store.layout import MODEL_FOLDER
from tinylmm.training.ranks import barrier, from_rank_zero, gather, rank, set_timeout, world_size

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

log = logging.getLogger(__name__)

ANSWERS = "answers"
GENERATIONS, SCORES = "generations.jsonl", "scores.json"
MODES = ("image", "blind")
RANKS_WAIT_S = 7 * 24 * 3600.0
"""Ranks meet when the slowest has answered its share; until then only a rank's end ends the others."""


def run(job: StageJob[EvalStage]) -> dict[str, Any]:
    """Write output/generations.jsonl and output/scores.json; the summary holds the metrics.

    Raises:
        StoppedError: a stop was asked for; what was answered is kept.
        UserError: the benchmark needs a judge and has none; the answers are kept, and the message says where.
        DataError: a question file or an image is missing or broken.
    """
    benchmark, items = read_items(job)
    set_timeout(RANKS_WAIT_S)
    keys = content_keys(items)
    asked = _ask(job, items, keys)
    barrier()
    if rank() != 0:
        return {}
    answers = read_answers(job.folder / ANSWERS)
    _refuse_unanswered(job, items, answers)
    return _score(job, benchmark, items, answers, asked, keys)


def _refuse_unanswered(job: StageJob[EvalStage], items: Sequence[Item], answers: Mapping[tuple[str, str], Any]) -> None:
    """What was answered and cannot be read any more must not count as wrong.

    Raises:
        IntegrityError: names how many answers are gone, and what to do.
    """
    modes = MODES if job.spec.blind else MODES[:1]
    gone = sum((mode, item.item_id) not in answers for mode in modes for item in items)
    if gone:
        raise IntegrityError(
            f"{job.folder / ANSWERS}: {gone} answers that were written cannot be read. Give the same command again: their "
            "questions are asked again."
        )


def read_items(job: StageJob[EvalStage]) -> tuple[Benchmark, list[Item]]:
    """The benchmark and its questions, from its own files or from a source of a data set."""
    (location,), spec = job.locations, job.spec
    root = job.root_of(location)
    benchmark = get_benchmark(spec.benchmark, job.settings.trust, **spec.options)
    if spec.source is None:
        return benchmark, benchmark.load(root, spec.layout)[: spec.limit]
    source = location.source
    assert source.annotations is not None  # a source of a data set has a file
    folder = root / source.images
    items = benchmark.load_source(root / source.annotations, folder, source.limit, source.follow_links)[: spec.limit]
    return benchmark, [_upright(item) for item in items] if source.orientation == "apply" else items


def _upright(item: Item) -> Item:
    """The same question with its images turned as their cameras say."""
    return replace(item, images=tuple(replace(ref, upright=True) for ref in item.images))


# ---------------------------------------------------------------------------------------------------- asking


def _ask(job: StageJob[EvalStage], items: Sequence[Item], keys: Mapping[str, str]) -> dict[str, Any]:
    """Answer what is not answered yet; returns how, for the summary (on every rank)."""
    folder = job.folder / ANSWERS
    # One rank reads what is answered: another may be writing already when the last one reads.
    answered = from_rank_zero(sorted(read_answers(folder)) if rank() == 0 else None)
    known = set(answered)
    modes = MODES if job.spec.blind else MODES[:1]
    open_items = {mode: [item for item in items if (mode, item.item_id) not in known] for mode in modes}
    counts = {"asked": 0, "near_ties": 0, "images_encoded": 0}
    exact, seconds = True, 0.0
    if any(open_items.values()):
        loaded = _load(job)
        for mode in modes:
            left = open_items[mode]
            mine = [left[i] for i in shard([cluster_of(item, keys) for item in left], rank(), world_size())]
            engine, spent = _answer(job, loaded, mine, mode, folder, keys)
            exact, seconds = exact and engine.exact, seconds + spent
            counts["asked"] += len(mine)
            counts["near_ties"] += engine.near_ties
            counts["images_encoded"] += engine.images_encoded
    totals = gather((counts, exact, seconds))
    return {
        **{name: sum(other[name] for other, _, _ in totals) for name in counts},
        "kept": len(known),
        "batch_independent": all(other for _, other, _ in totals),
        "generation_s": round(max(other for _, _, other in totals), 3),
        "world_size": world_size(),
    }


def _load(job: StageJob[EvalStage]) -> LoadedModel:
    launch, precision = job.settings.launch, job.spec.precision
    device = choose_device(launch.device, precision)
    attention = choose_attention(launch.attention, precision, device)
    loaded = load_model(job.parents["model"] / MODEL_FOLDER, job.settings.trust, launch.attention)
    to_precision(loaded.model, device, DTYPES[precision])
    loaded.model.set_attention(attention)
    loaded.model.eval()
    return loaded


def _answer(
    job: StageJob[EvalStage],
    loaded: LoadedModel,
    items: Sequence[Item],
    mode: str,
    folder: Path,
    keys: Mapping[str, str],
) -> tuple[Engine, float]:
    """Answer items in one mode, each reply on disk as soon as its batch is done."""
    launch, maker = job.settings.launch, PromptMaker(get_template(job.spec.template), loaded.tokenizer)
    refs = first_refs(items, keys)
    model = loaded.model
    sizes = {key: open_image_ref(ref).size for key, ref in refs.items()} if model.tiled else None
    counts = dict.fromkeys(refs, model.image_tokens)
    if sizes is not None:
        counts = {key: model.tokens_of(*size) for key, size in sizes.items()}
    engine = Engine(
        model,
        _Pixels(refs, ImageTransform.of(loaded.description.image)),
        maker.ends,
        Sampling(max_new_tokens=job.spec.max_new_tokens),
        rows=launch.eval_batch,
        tokens=launch.eval_tokens,
        sizes=sizes,
    )
    prompts: list[Prompt] = []
    for item in items:
        images = [keys[ref.key] for ref in item.images] if mode == "image" else []
        tokens = [counts[key] for key in images]
        prompts.append(maker.prompt(item.item_id, [question(item.prompt, len(images))], images, tokens))
    done, began = 0, time.perf_counter()
    with AnswerFile(folder / f"rank{rank()}.jsonl") as file:
        for replies in engine.replies(prompts):
            file.append(_row(mode, reply, maker) for reply in replies)
            done += len(replies)
            if rank() == 0:
                speed = done / (time.perf_counter() - began)
                job.metrics.append(step=done, steps=len(prompts), mode=mode, samples_per_s=speed)
    return engine, time.perf_counter() - began


class _Pixels:
    """Content key of an image -> pixels as the tower takes them."""

    def __init__(self, refs: Mapping[str, ImageRef], transform: ImageTransform) -> None:
        self.refs = refs
        self.transform = transform

    def __call__(self, key: str) -> Tensor:
        return self.transform(open_image_ref(self.refs[key]))


def _row(mode: str, reply: Reply, maker: PromptMaker) -> dict[str, Any]:
    return {
        "mode": mode,
        "id": reply.item_id,
        "text": maker.text(reply.ids).strip(),
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "latency_s": round(reply.seconds, 4),
        "batch": reply.rows,
    }


# ---------------------------------------------------------------------------------------------------- scoring


def _score(
    job: StageJob[EvalStage],
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: dict[tuple[str, str], dict[str, Any]],
    asked: dict[str, Any],
    keys: Mapping[str, str],
) -> dict[str, Any]:
    answers = {mode: {i: Answer(row["text"]) for (m, i), row in rows.items() if m == mode} for mode in MODES}
    variant, judge = job.spec.variant, _judge(job)
    _write_upload(job, benchmark, items, answers["image"])
    if benchmark.judged and judge is None:
        _write_generations(job, benchmark, items, rows, None, None)
        raise UserError(
            f"{benchmark.name} is scored by a judge, and none is set: all {len(items)} questions are answered, and the "
            f"answers are kept in {job.output / GENERATIONS}. Set eval.{job.name.split('@')[0]}.judge.base_url and "
            f".model and give the same command again (nothing is asked of the model twice), or score the file with "
            f"`tinylmm score {benchmark.name}`."
        )
    scores = benchmark.score(items, answers["image"], variant, judge)
    blind = benchmark.score(items, answers["blind"], variant, judge) if job.spec.blind else None
    metrics = score_rows(benchmark, items, answers["image"], scores, blind, keys, judge is not None)
    protocol = f"{benchmark.name}-{scores.variant}"
    _write_generations(job, benchmark, items, rows, scores, blind)
    record = {
        "benchmark": benchmark.name,
        "protocol": protocol,
        "variant": scores.variant,
        "model_digest": job.parents["model"].parent.name,
        "metrics": metrics,
        **{key: value for key, value in scores.as_json().items() if key not in ("benchmark", "variant")},
        "generation": asked,
    }
    (job.output / SCORES).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    images = len(set(keys.values()))
    return {"protocol": protocol, "metrics": metrics, "questions": len(items), "images": images, **asked}


def _write_upload(
    job: StageJob[EvalStage], benchmark: Benchmark, items: Sequence[Item], answers: dict[str, Answer]
) -> None:
    """Write output/upload.* where the benchmark has a server and these questions are its."""
    if not benchmark.upload:
        return
    path = job.output / f"upload.{benchmark.upload}"
    try:
        benchmark.write_submission(items, answers, path)
    except (ConfigError, DataError) as error:
        # scored locally, or the server's own list is not at hand: no fault of the run
        path.unlink(missing_ok=True)
        log.warning("no upload file for %s: %s", benchmark.name, error)


def _judge(job: StageJob[EvalStage]) -> Judge | None:
    """The judge that the run names: some benchmarks need one, others (MMBench) let it read what their rules cannot."""
    (location,) = job.locations
    if location.judge_url is None or job.spec.judge is None:
        return None
    from tinylmm.evaluation.judge import Judge, default_cache

    return Judge(location.judge_url, job.spec.judge, cache=default_cache())


def _write_generations(
    job: StageJob[EvalStage],
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: dict[tuple[str, str], dict[str, Any]],
    scores: Scores | None,
    blind: Scores | None,
) -> None:
    """One line an item in the order of the question file; `question_id`, `prompt` and `text` as in LLaVA's answer files."""
    folder = _image_folder(job)
    unknown: dict[str, Any] = {}
    by_id = {row.item_id: row for row in scores.per_item} if scores else unknown
    blind_by_id = {row.item_id: row for row in blind.per_item} if blind else unknown
    with (job.output / GENERATIONS).open("w", encoding="utf-8") as file:
        for item in items:
            answer, unseen = rows["image", item.item_id], rows.get(("blind", item.item_id))
            row, blind_row = by_id.get(item.item_id), blind_by_id.get(item.item_id)
            line = {
                "item_id": item.item_id,
                "question_id": item.question_id,
                "image": _image_name(item.images[0], folder) if item.images else "",
                "images": [_image_record(ref, folder) for ref in item.images],
                "category": item.category,
                "prompt": item.prompt,
                "truth": benchmark.truth(item),
                "text": answer["text"],
                "score": row.score if row else None,
                "correct": _correct(row.score if row else None),
                "blind_text": unseen["text"] if unseen else None,
                "blind_score": blind_row.score if blind_row else None,
                "blind_correct": _correct(blind_row.score) if blind_row else None,
                "options": item.options,
                **{key: answer[key] for key in ("prompt_tokens", "new_tokens", "latency_s", "batch")},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _correct(score: float | None) -> bool | None:
    """Right or wrong, for showing: at least half of what can be had."""
    return None if score is None else score >= 0.5


def _image_folder(job: StageJob[EvalStage]) -> Path:
    (location,) = job.locations
    return (job.root_of(location) / location.source.images).resolve()


def _image_name(ref: ImageRef, folder: Path) -> str:
    """Path below `folder`, where the report looks for it; absolute where the image lies elsewhere."""
    path = ref.path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _image_record(ref: ImageRef, folder: Path) -> dict[str, Any]:
    cell = {} if ref.row is None else {"row": ref.row, "column": ref.column}
    return {"path": _image_name(replace(ref, data=None), folder), **cell}
