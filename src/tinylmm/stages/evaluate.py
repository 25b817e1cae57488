"""The `eval` stage: ask a benchmark's questions of a trained model, keep the raw answers, score them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tinylmm.data.chat import get_template
from tinylmm.data.images import ImageTransform, image_size, open_image, safe_path
from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation import digits
from tinylmm.evaluation.generate import answer_questions, image_features
from tinylmm.evaluation.questions import read_questions
from tinylmm.models.checkpoint import load_model
from tinylmm.stages.devices import choose_device
from tinylmm.stages.job import StageJob

log = logging.getLogger(__name__)

BENCHMARKS = {"digits": digits}
"""Name in `eval.<key>.benchmark` -> module with PROTOCOL, generation_row and score."""


def run(job: StageJob) -> dict[str, Any]:
    """Write output/generations.jsonl and output/scores.json; the summary holds the metrics."""
    benchmark = job.spec["benchmark"]
    if benchmark not in BENCHMARKS:
        raise ConfigError(
            [
                Fault(
                    "eval",
                    f"benchmark '{benchmark}' is none of {', '.join(BENCHMARKS)}.",
                    suggestion(benchmark, BENCHMARKS),
                )
            ]
        )
    scorer = BENCHMARKS[benchmark]
    launch = job.settings["launch"]
    device = choose_device(launch["device"], "fp32")
    loaded = load_model(job.parents["model"] / "model", job.settings["trust"], launch["attention"])
    model = loaded.model.to(device).eval()

    location = job.settings["location"]
    root = Path(location["root"]) if location["root"] else job.parents["data"]
    source = location["source"]
    questions = read_questions(root / source["annotations"], source["limit"])
    transform = ImageTransform(**loaded.description["image"])
    names = sorted({question.image for question in questions})
    paths = {name: safe_path(root / source["images"], name) for name in names}
    features = image_features(model, names, lambda name: transform(open_image(paths[name])))
    sizes = {name: image_size(path) for name, path in paths.items()} if model.tiled else None

    template = get_template(job.spec["template"])
    options = {"max_new_tokens": job.spec["max_new_tokens"], "batch": launch["eval_batch"], "sizes": sizes}
    texts = answer_questions(model, loaded.tokenizer, template, questions, features, **options)
    blind: list[str] | list[None] = [None] * len(texts)
    if job.spec["blind"]:
        blind = answer_questions(model, loaded.tokenizer, template, questions, None, **options)

    rows = [scorer.generation_row(digits.Answered(*item)) for item in zip(questions, texts, blind, strict=True)]
    metrics = scorer.score(rows)
    with (job.output / "generations.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scores = {
        "benchmark": benchmark,
        "protocol": scorer.PROTOCOL,
        "model_digest": job.parents["model"].parent.name,
        "metrics": metrics,
    }
    (job.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return {"protocol": scorer.PROTOCOL, "metrics": metrics, "questions": len(rows), "images": len(names)}
