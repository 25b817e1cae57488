"""The embedded digits benchmark: exact match, per question type; asks any question file of the same fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl
from tinylmm.evaluation.benchmarks.pairing import unique_ids
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

QUESTIONS, IMAGES = "test.jsonl", "images"
FIELDS = ("question_id", "text", "category", "answer", "options")
"""Of a line of the question file, beside `image` or `video`; `options` is how many answers a uniform guesser chooses from."""


def normalise(text: str) -> str:
    """Lower case, no surrounding space, no full stop at the end: `" 3."` is `"3"`."""
    return text.strip().rstrip(".").strip().lower()


def is_correct(text: str, truth: str) -> bool:
    """Exact match after `normalise`; an empty answer is wrong."""
    return normalise(text) == normalise(truth) != ""


class Digits(Benchmark):
    """Short answers to questions about scenes."""

    name: ClassVar[str] = "digits"
    variants: ClassVar[tuple[str, ...]] = ("exact-match-v1",)
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 8

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `test.jsonl`, and images below `images`."""
        return _read_items(root / QUESTIONS, lambda name, _: image_file(root / IMAGES, name, QUESTIONS))

    def load_source(
        self, questions: Path, images: Path, limit: int | None = None, follow_links: bool = False
    ) -> list[Item]:
        """As `Benchmark.load_source`; loads torch with `data/images.py`."""
        from tinylmm.data.images import safe_path

        return _read_items(questions, lambda name, what: ImageRef(safe_path(images, name, follow_links, what)), limit)

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Accuracy in percent: overall first, then `accuracy/<category>` in alphabetical order; no items, no metrics."""
        per_item = []
        for item in items:
            answer = answers.get(item.item_id)
            right = answer is not None and is_correct(answer.text, item.reference)
            per_item.append(ItemScore(item.item_id, float(right), (normalise(answer.text) or None) if answer else None))
        metrics, found = Metrics(digits=4), graded(items, per_item)
        if found:
            metrics.mean("accuracy", found)
            metrics.means_by("accuracy", found, lambda item: item.category, ordered=True)
        counts = count_items(items, answers, per_item)
        variant = pick_variant(self, variant)
        return Scores(self.name, variant, metrics.aggregate, tuple(per_item), counts, metrics.bases)


def _read_items(path: Path, image: Callable[[str, str], ImageRef], limit: int | None = None) -> list[Item]:
    """Items of a question file; `image` finds what a record names, an image or a video."""
    if not path.is_file():
        raise DataError(f"question file {path} does not exist")
    records = read_jsonl(path, FIELDS)[:limit]
    return [
        Item(
            item_id=name,
            question_id=record["question_id"],
            prompt=record["text"],
            images=(_shown(path, record, image),),
            category=record["category"],
            reference=record["answer"],
            options=record["options"],
        )
        for name, record in zip(unique_ids(record["question_id"] for record in records), records, strict=True)
    ]


def _shown(path: Path, record: Mapping[str, Any], image: Callable[[str, str], ImageRef]) -> ImageRef:
    named = [key for key in ("image", "video") if record.get(key) is not None]
    if len(named) != 1 or not isinstance(record[named[0]], str):
        found = (
            f"both {' and '.join(named)}" if len(named) > 1 else "neither" if not named else f"no text as {named[0]}"
        )
        raise DataError(f"{path}: question {record['question_id']!r} must name an image or a video, but has {found}.")
    return replace(image(record[named[0]], named[0]), video=named[0] == "video")
