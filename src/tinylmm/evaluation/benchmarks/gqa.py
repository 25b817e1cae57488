"""GQA testdev-balanced (12,578 questions about 398 images): exact answers, by type and length of the question.

Sources: GQA's eval.py; LLaVA's convert_gqa_for_eval.py; lmms-eval's gqa. Validity and plausibility need choices files that
GQA 1.2 does not ship, and are left out, as in LLaVA.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import unique_ids
from tinylmm.evaluation.benchmarks.prompts import SHORT_ANSWER, read_questions
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "The question file is in LLaVA's eval.zip; testdev_balanced_questions.json and the images are on gqadataset.org."
QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = tuple(
    f"{folder}testdev_balanced_questions.json"
    for folder in ("", "data/", "questions/", "data/questions/", "questions1.2/")
)
_FINAL_STEPS = ("exist", "query: name", "choose name")
"""Operations that eval.py does not count as reasoning steps; found anywhere in `operation: argument`."""


@dataclass(frozen=True)
class GQAReference:
    """What scoring needs of a question.

    Attributes:
        answer: as GQA spells it.
        balanced: questions that are not take no part.
        structural, semantic: type of the question (`query`, `verify`, ...; `rel`, `attr`, ...).
        steps, words: length of the reasoning and of the question.
        group: global answer group, for the distribution; None where the question has none.
    """

    answer: str
    balanced: bool
    structural: str
    semantic: str
    steps: int
    words: int
    group: str | None


def llava_text(text: str) -> str:
    """LLaVA's post-processing, all of it: final periods off, lower case. Nothing is stripped."""
    return text.rstrip(".").lower()


def lmms_text(text: str) -> str:
    """lmms-eval: lower case, all ASCII punctuation deleted ("t-shirt" equals "tshirt"), on both sides."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


class GQA(Benchmark):
    """Accuracy in percent. `official` compares the answer as it is; `llava` and `lmms` normalise it first."""

    name: ClassVar[str] = "gqa"
    variants: ClassVar[tuple[str, ...]] = ("llava", "official", "lmms")
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 128

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read LLaVA's question file (without it: all official questions, with the same prompt) and the annotations."""
        files = BenchmarkFiles.under(root, GET, "gqa")
        if layout == "hf":
            return self._load_hf(files)
        path = files.file(*ANNOTATIONS)
        records = read_object(path)
        found = files.find(QUESTIONS)
        questions = read_questions(found) if found else _official_questions(records, path)
        folder = files.image_folder("data/images", "images")
        items = []
        for name, row in zip(unique_ids(question["question_id"] for question in questions), questions, strict=True):
            record = records.get(str(row["question_id"]))
            if record is None:
                raise DataError(f"{QUESTIONS}: question {row['question_id']} is not in {path}. {GET}")
            image = image_file(folder, row["image"], f"{QUESTIONS}, question {name}")
            reference = _reference(record, f"{path}, question {name}")
            items.append(_item(name, row["question_id"], row["text"], image, reference))
        return items

    def _load_hf(self, files: BenchmarkFiles) -> list[Item]:
        rows = read_parquet(
            files.parquet("testdev", "testdev_balanced_instructions"),
            ("id", "imageId", "question", "answer"),
            ("isBalanced", "groups", "types", "semantic"),
        )
        folder = files.find("testdev_balanced_images")
        paths = files.parquet("testdev", "testdev_balanced_images") if folder else []
        images = {row.values["id"]: row.image() for row in read_parquet(paths, ("id",))}
        absent = files.candidates(["testdev_balanced_images"])[0]  # scoring needs no images; opening one will say so
        items = []
        for name, row in zip(unique_ids(row.values["id"] for row in rows), rows, strict=True):
            image = images.get(row.values["imageId"], ImageRef(absent / row.values["imageId"]))
            if folder and image.row is None:
                raise DataError(f"{row.where}: no image {row.values['imageId']} in testdev_balanced_images. {GET}")
            text = row.values["question"] + SHORT_ANSWER
            items.append(_item(name, row.values["id"], text, image, _reference(row.values, row.where)))
        return items

    def truth(self, item: Item) -> str:
        """As `Benchmark.truth`."""
        return str(item.reference.answer)

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score; a missing answer is wrong here, where GQA's script refuses the file."""
        variant = pick_variant(self, variant)
        per_item = tuple(_score_item(item, answers.get(item.item_id), variant) for item in items)
        scored = [(item, row) for item, row in zip(items, per_item, strict=True) if row.score is not None]
        unbalanced = len(items) - len(scored)
        counts = count_items(items, answers, per_item, **({"unbalanced": unbalanced} if unbalanced else {}))
        metrics = _metrics(scored, lmms_text if variant == "lmms" else str)
        return Scores(self.name, variant, metrics.aggregate, per_item, counts, metrics.bases)


def _score_item(item: Item, answer: Answer | None, variant: str) -> ItemScore:
    if not item.reference.balanced:
        return ItemScore(item.item_id, None)
    if answer is None:
        return ItemScore(item.item_id, 0.0)
    gold, parsed = item.reference.answer, answer.text
    if variant == "llava":
        parsed = llava_text(parsed)
    elif variant == "lmms":
        gold, parsed = lmms_text(gold), lmms_text(parsed)
    return ItemScore(item.item_id, float(parsed == gold), parsed if answer.text.strip() else None)


def _metrics(scored: Sequence[tuple[Item, ItemScore]], spelling: Callable[[str], str]) -> Metrics:
    """Accuracies in percent (two decimals), and `distribution`: chi-square / 100, lower is better."""
    metrics = Metrics()
    rows = [(item, row.score or 0.0) for item, row in scored]
    metrics.mean("accuracy", rows)
    metrics.mean("binary", [row for row in rows if row[0].reference.structural != "query"])
    metrics.mean("open", [row for row in rows if row[0].reference.structural == "query"])
    distribution = _chi_square([(item.reference, row) for item, row in scored], spelling) / 100
    metrics.other("distribution", round(distribution, 2), (item for item, _ in scored), top=None)
    metrics.means_by("semantic", rows, lambda item: item.reference.semantic or "unknown", ordered=True)
    metrics.means_by("steps", rows, lambda item: f"{item.reference.steps:02d}", ordered=True)
    metrics.means_by("structural", rows, lambda item: item.reference.structural or "unknown", ordered=True)
    metrics.means_by("words", rows, lambda item: f"{item.reference.words:02d}", ordered=True)
    return metrics


def _chi_square(scored: Sequence[tuple[GQAReference, ItemScore]], spelling: Callable[[str], str]) -> float:
    """Mean over the answer groups, weighted by their questions, of the chi-square between true and predicted answers.

    `spelling` writes true answers as the predicted ones are compared.
    """
    gold, predicted = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    for reference, row in scored:
        if reference.group is not None:
            gold[reference.group][spelling(reference.answer)] += 1
            predicted[reference.group][row.parsed or ""] += 1
    total = sum(counts.total() for counts in gold.values())
    statistic = sum(
        counts.total()
        * sum((predicted[group][answer] - expected) ** 2 / expected for answer, expected in counts.items())
        for group, counts in gold.items()
    )
    return statistic / total if total else 0.0


def _item(name: str, question_id: Any, text: str, image: ImageRef, reference: GQAReference) -> Item:
    # binary questions offer two answers (yes and no, or the two that they name)
    options = 0 if reference.structural == "query" else 2
    return Item(name, question_id, text, (image,), reference.structural, reference, options)


def _reference(record: Any, where: str) -> GQAReference:
    require(record, ("question", "answer"), where)
    types, groups = record.get("types") or {}, record.get("groups") or {}
    balanced = record.get("isBalanced")
    return GQAReference(
        answer=record["answer"],
        balanced=balanced is None or bool(balanced),
        structural=types.get("structural") or "",
        semantic=types.get("semantic") or "",
        steps=sum(_is_step(operation) for operation in record.get("semantic") or ()),
        words=len(record["question"].split()),
        group=groups.get("global"),
    )


def _is_step(operation: Mapping[str, Any]) -> bool:
    text = f"{operation.get('operation')}: {operation.get('argument')}"
    return not any(final in text for final in _FINAL_STEPS)


def _official_questions(records: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    for name, record in records.items():
        require(record, ("imageId", "question", "answer"), f"{path}, question {name}")
    return [
        {"question_id": name, "image": f"{record['imageId']}.jpg", "text": record["question"] + SHORT_ANSWER}
        for name, record in records.items()
    ]
