"""The `judge` stage: let a judge model score answers that an `eval` stage has kept. The model itself is asked nothing."""

from __future__ import annotations

import json
from typing import Any

from tinylmm.evaluation.images import content_keys
from tinylmm.evaluation.judge import Judge, default_cache
from tinylmm.planning.specs import JudgeStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.scoring import Asked, read_items, read_rows, write_scores
from tinylmm.store.layout import GENERATIONS_FILE, SCORES_FILE


def run(job: StageJob[JudgeStage]) -> dict[str, Any]:
    """Write output/generations.jsonl and output/scores.json; the summary holds the metrics.

    Raises:
        StoppedError: a stop was asked for; the judge's replies so far are kept.
        JudgeError, ConfigError: the judge gives no usable reply, or refuses.
        DataError: a question file is missing or broken.
    """
    (location,), spec, answers = job.locations, job.spec, job.parents["answers"]
    assert location.judge_url is not None and spec.judge is not None, "the runner lets this stage wait for its judge"
    benchmark, items, total = read_items(job)
    how = json.loads((answers / SCORES_FILE).read_text(encoding="utf-8"))["generation"]
    asked = Asked(benchmark, items, total, content_keys(items), read_rows(answers / GENERATIONS_FILE), how)
    judge = Judge(location.judge_url, spec.judge, cache=default_cache(), runs=spec.judge_runs)
    return write_scores(job, asked, judge)
