"""MMVU (validation): expert questions about videos of 27 subjects, multiple choice and open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, listing
from tinylmm.evaluation.benchmarks.files import read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, pick_variant
from tinylmm.evaluation.benchmarks.video import VideoRef, video_path
from tinylmm.evaluation.benchmarks.video_choice import by_leading_letter, known_letter, scores_of

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "validation.json and videos/ are in https://huggingface.co/datasets/yale-nlp/MMVU."
KINDS = ("multiple-choice", "open-ended")
SAMPLING = SamplingSpec(fps=1, max=64)
"""TinyLLaVA-Video's: its script asks for a frame a second and at most 64, whatever the model was trained with."""
OPEN_SUFFIX = "Answer the question directly without explanation."
_FIELDS = ("id", "video", "question_type", "question", "choices", "answer")
_AT_HOME = "/resolve/main/"
"""Videos are named by their address on the Hub; what follows this is the path below the data set's folder."""


class MMVU(Benchmark):
    """MMVU.

    Variants: `tinyllava_video` (its prompts and parser; an open answer is right if the longer of answer and truth contains the
    shorter, in any case; an empty one counts as right there, and here) and `strict` (the same, but an empty one is wrong).
    Aggregate: `overall`, over both kinds of questions, `multiple-choice`, `open-ended`, and one metric a subject; percent.
    """

    name = "mmvu"
    variants = ("tinyllava_video", "strict")
    headline = "overall"
    max_new_tokens = 1024

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `validation.json`, or for `hf` `validation-*.parquet` where that is not there."""
        files = BenchmarkFiles.under(root, GET, "MMVU", "mmvu")
        return [_item(files, record, where) for record, where in _records(files, layout)]

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters, and open answers by the words they hold; see the class for variants and metrics."""
        variant = pick_variant(self, variant)

        def read(item: Item, text: str) -> ItemScore | None:
            if item.reference["options"]:
                return by_leading_letter(item, text)
            right = contains_either(text, item.reference["answer"]) and (text != "" or variant == "tinyllava_video")
            return ItemScore(item.item_id, float(right), text or None)

        return scores_of(self, variant, items, answers, read, _metrics)


def _metrics(rows: Graded) -> Metrics:
    metrics = Metrics()
    metrics.mean("overall", rows)
    for kind in KINDS:
        if within := [row for row in rows if row[0].reference["kind"] == kind]:
            metrics.mean(kind, within)
    metrics.means_by("subject", rows, lambda item: item.category)
    return metrics


def contains_either(text: str, truth: str) -> bool:
    """Whether one of the two holds the other, in any case."""
    said, meant = text.lower(), truth.lower()
    return said in meant or meant in said


def _records(files: BenchmarkFiles, layout: Format) -> Iterator[tuple[dict[str, Any], str]]:
    path = files.find("validation.json")
    if path is None and layout == "hf" and files.has_parquet("validation"):
        for row in read_parquet(files.parquet("validation"), _FIELDS, ("metadata",)):
            yield row.values, row.where
        return
    path = path or files.file("validation.json")
    for number, record in enumerate(read_list(path), 1):
        yield record, f"{path}, record {number}"


def _item(files: BenchmarkFiles, record: dict[str, Any], where: str) -> Item:
    require(record, _FIELDS, where)
    kind, gold = record["question_type"], str(record["answer"])
    if kind not in KINDS:
        raise DataError(f"{where}: question_type {kind!r} is none of {', '.join(KINDS)}. Fetch the file again.")
    choices = record["choices"]
    choices = json.loads(choices) if isinstance(choices, str) else choices
    # every key is listed, empty ones too, as there
    options = {str(k): "" if v is None else str(v) for k, v in (choices or {}).items()} if kind == KINDS[0] else {}
    if kind == KINDS[0]:
        known_letter(gold, options, where)
    name = str(record["video"]).rpartition(_AT_HOME)[2]
    metadata = record.get("metadata")
    subject = metadata.get("subject") if isinstance(metadata, Mapping) else None
    asked = (
        f"{record['question']}\n{listing(options)}\n{LETTER_SUFFIX}"
        if options
        else f"{record['question']}\n{OPEN_SUFFIX}"
    )
    video = VideoRef(video_path(files.image_folder("videos").parent, name, where), sampling=SAMPLING)
    return Item(
        item_id=str(record["id"]),
        question_id=record["id"],
        prompt=asked,
        images=(video.shown,),
        category=str(subject or str(record["id"]).rpartition("_")[0].removeprefix("validation_") or "all"),
        reference={
            "options": options,
            "answer": gold,
            "kind": kind,
            "video": video,
        },
        options=len(options),
    )
