"""The `eval` stage: ask a benchmark's questions of a trained model, keep the raw answers, score them.

Asking and scoring are separate. Answers go to work files as they come (a killed stage asks only what it has not answered);
when all are there, output/generations.jsonl holds them in the order of the question file and output/scores.json what they
are worth by rules. What a judge says of them is a stage of its own (`stages/judging.py`). Runs on every rank: each answers the
questions about its share of the images.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinylmm.config.video import SamplingSpec
from tinylmm.data.chat import get_template
from tinylmm.data.slots import question
from tinylmm.errors import IntegrityError
from tinylmm.evaluation.answers import AnswerFile, read_answers, shard
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.images import cluster_of, content_keys, first_refs
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine, Reply
from tinylmm.generation.fixed import FixedDecoder, fixed_on_gpu
from tinylmm.generation.images import EncodedImages
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.attention import choose_attention
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.devices import DTYPES, choose_device, to_precision
from tinylmm.planning.specs import EvalStage
from tinylmm.stages.images import FAULTS_FILE
from tinylmm.stages.job import StageJob
from tinylmm.stages.scoring import MODES, UNREADABLE, Asked, read_items, write_scores, write_upload
from tinylmm.stages.shown import Shown, fault_of, model_folder, refuse_faults, sampling_of
from tinylmm.training.ranks import barrier, from_rank_zero, gather, rank, set_timeout, world_size

log = logging.getLogger(__name__)

ANSWERS = "answers"
RANKS_WAIT_S = 7 * 24 * 3600.0
"""Ranks meet when the slowest has answered its share; until then only a rank's end ends the others."""


def run(job: StageJob[EvalStage]) -> dict[str, Any]:
    """Write output/generations.jsonl and output/scores.json; the summary holds the metrics.

    output/faults.jsonl names the images and videos that could not be read, where there are any.

    Raises:
        StoppedError: a stop was asked for; what was answered is kept.
        DataError: a question file is missing or broken, or more images and videos are than the evaluation allows.
    """
    benchmark, items, total = read_items(job)
    set_timeout(RANKS_WAIT_S)
    keys = content_keys(items)
    sampling = sampling_of(job, items)
    how, faults = _ask(job, benchmark, items, keys, sampling)
    barrier()
    if rank() != 0:
        return {}
    answers = read_answers(job.folder / ANSWERS) | _not_shown(job, items, keys, faults)
    _refuse_unanswered(job, items, answers)
    asked = Asked(benchmark, items, total, keys, answers, how)
    write_upload(job, asked)
    return write_scores(job, asked)


def _not_shown(
    job: StageJob[EvalStage], items: Sequence[Item], keys: Mapping[str, str], faults: Mapping[str, str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the questions about what could not be read, which is named in the log and in output/faults.jsonl."""
    for fault in faults.values():
        log.warning("%s", fault)
    if faults:
        lines = [json.dumps({"image": key, "fault": fault}) + "\n" for key, fault in sorted(faults.items())]
        (job.output / FAULTS_FILE).write_text("".join(lines), encoding="utf-8")
    nothing = {"text": "", "prompt_tokens": 0, "new_tokens": 0, "latency_s": 0.0, "batch": 0}
    found = {}
    for item in items:
        if (wrong := fault_of(item, keys, faults)) is not None:
            found[MODES[0], item.item_id] = {**nothing, UNREADABLE: wrong}
    return found


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


# ---------------------------------------------------------------------------------------------------- asking


def _ask(
    job: StageJob[EvalStage],
    benchmark: Benchmark,
    items: Sequence[Item],
    keys: Mapping[str, str],
    sampling: SamplingSpec | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Answer what is not answered yet; returns how, for the summary, and what could not be read (on every rank)."""
    folder = job.folder / ANSWERS
    # One rank reads what is answered: another may be writing already when the last one reads.
    answered = from_rank_zero(sorted(read_answers(folder)) if rank() == 0 else None)
    known = set(answered)
    modes = MODES if job.spec.blind else MODES[:1]
    open_items = {mode: [item for item in items if (mode, item.item_id) not in known] for mode in modes}
    counts = {"asked": 0, "near_ties": 0, "images_encoded": 0}
    exact, seconds, encoded = True, 0.0, 0
    faults: dict[str, str] = {}
    if any(open_items.values()):
        model = _load(job)
        shown = Shown(job, model.loaded, first_refs(open_items[MODES[0]], keys), sampling)
        encoded, faults = shown.computed, shown.faults
        for mode in modes:
            left = open_items[mode]
            mine = [left[i] for i in shard([cluster_of(item, keys) for item in left], rank(), world_size())]
            asking = [(item, benchmark.prompt_at(item, partial(shown.times, item, keys))) for item in mine]
            engine, spent = _answer(job, model, asking, mode, keys, shown)
            exact, seconds = exact and engine.exact, seconds + spent
            counts["asked"] += len(mine)
            counts["near_ties"] += engine.near_ties
            counts["images_encoded"] += engine.images_encoded
    totals = gather((counts, exact, seconds, faults))
    unread = {key: fault for *_, others in totals for key, fault in others.items()}
    refuse_faults(job, unread)
    how = {
        **{name: sum(other[name] for other, *_ in totals) for name in counts},
        "kept": len(known),
        "batch_independent": all(other for _, other, *_ in totals),
        "generation_s": round(max(other for _, _, other, _ in totals), 3),
        "world_size": world_size(),
        **({} if sampling is None else {"frames": sampling.in_words, "clips_encoded": encoded}),
        **({"unreadable": len(unread)} if unread else {}),
    }
    return how, unread


@dataclass(frozen=True)
class _Asked:
    """The model that is asked, how questions are put to it, and how a GPU decodes it in both modes."""

    loaded: LoadedModel
    maker: PromptMaker
    fixed: FixedDecoder | None


def _load(job: StageJob[EvalStage]) -> _Asked:
    launch, precision = job.settings.launch, job.spec.precision
    device = choose_device(launch.device, precision)
    attention = choose_attention(launch.attention, precision, device)
    loaded = load_model(model_folder(job), job.settings.trust, launch.attention)
    to_precision(loaded.model, device, DTYPES[precision])
    loaded.model.set_attention(attention)
    llm = loaded.model.eval().llm
    maker = PromptMaker(get_template(job.spec.template), loaded.tokenizer)
    return _Asked(loaded, maker, fixed_on_gpu(llm, maker.ends, launch.eval_tokens))


def _answer(
    job: StageJob[EvalStage],
    to: _Asked,
    asking: Sequence[tuple[Item, str]],
    mode: str,
    keys: Mapping[str, str],
    shown: Shown,
) -> tuple[Engine, float]:
    """Answer items, each with what is asked, in one mode; a reply is on disk as soon as its batch is done.

    Replies about what could not be read are thrown away: the next try reads it anew.
    """
    launch, maker, model = job.settings.launch, to.maker, to.loaded.model
    engine = Engine(
        model,
        shown.pixels,
        maker.ends,
        Sampling(max_new_tokens=job.spec.max_new_tokens),
        rows=launch.eval_batch,
        tokens=launch.eval_tokens,
        sizes=shown.extents,
        images=EncodedImages(model, stored=shown.stored),
        fixed=to.fixed,
        readers=shown.readers,
    )
    prompts: list[Prompt] = []
    for item, text in asking:
        images = [keys[ref.key] for ref in item.images] if mode == "image" else []
        tokens = [model.tokens_of(*shown.extents[key]) for key in images]
        prompts.append(maker.prompt(item.item_id, [question(text, len(images))], images, tokens))
    asked = {item.item_id: (item, text) for item, text in asking}
    done, began = 0, time.perf_counter()
    with AnswerFile(job.folder / ANSWERS / f"rank{rank()}.jsonl") as file:
        for replies in engine.replies(prompts):
            read = [
                reply
                for reply in replies
                if mode != "image" or not fault_of(asked[reply.item_id][0], keys, shown.faults)
            ]
            file.append(_row(mode, reply, maker, *asked[reply.item_id]) for reply in read)
            done += len(replies)
            if rank() == 0:
                speed = done / (time.perf_counter() - began)
                job.metrics.append(step=done, steps=len(prompts), mode=mode, samples_per_s=speed)
    return engine, time.perf_counter() - began


def _row(mode: str, reply: Reply, maker: PromptMaker, item: Item, asked: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "id": reply.item_id,
        "text": maker.text(reply.ids).strip(),
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "latency_s": round(reply.seconds, 4),
        "batch": reply.rows,
        **({} if asked == item.prompt else {"prompt": asked}),
    }
