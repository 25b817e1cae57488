"""POPE: yes-or-no questions about objects, in three categories, reported as F1 (LLaVA) or accuracy (TinyLLaVA Factory).

Sources: POPE's evaluate.py and LLaVA's eval_pope.py (the same rule); lmms-eval's pope. Labels must be those of POPE commit
e3e39262: the later `random` file asks other questions, and pairing by position would score those in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl, read_parquet
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import unique_ids
from tinylmm.evaluation.benchmarks.prompts import SHORT_ANSWER, question_in, read_questions
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "The question file is in LLaVA's eval.zip; the labels are output/coco/coco_pope_*.json of commit e3e39262 of "
    "github.com/AoiDragon/POPE (no other commit fits the questions); the images are COCO val2014."
)
QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES = ("random", "popular", "adversarial")


def official_answer(text: str) -> str:
    """ "no" if the text before the first period, commas deleted and split at single spaces, has No, not or no; else "yes".

    So "NO", "Nope", "isn't", "", "No!" and ".No" are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def lmms_answer(text: str) -> str | None:
    """lmms-eval: lower case and stripped, it must be the word itself ("Yes." is neither)."""
    word = text.lower().strip()
    return word if word in ("yes", "no") else None


@dataclass
class Confusion:
    """Counts of answers against labels; "yes" is positive. An answer that is neither, or missing, is only in `items`."""

    items: int = 0
    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0
    label_yes: int = 0

    def add(self, parsed: str | None, label: str) -> None:
        """Count one item."""
        self.items += 1
        self.label_yes += label == "yes"
        self.true_yes += parsed == label == "yes"
        self.true_no += parsed == label == "no"
        self.false_yes += parsed == "yes" != label
        self.false_no += parsed == "no" != label

    def metrics(self, lmms: bool) -> dict[str, float]:
        """accuracy, precision, recall, F1 and yes-ratio, times 100; 0 where a denominator is 0.

        An answer that is neither yes nor no misses its object; lmms-eval leaves it out of the recall, and its yes-ratio
        is that of the labels.
        """
        positives = self.true_yes + self.false_no if lmms else self.label_yes
        precision = _ratio(self.true_yes, self.true_yes + self.false_yes)
        recall = _ratio(self.true_yes, positives)
        return {
            "f1": 100 * _ratio(2 * precision * recall, precision + recall),
            "accuracy": 100 * _ratio(self.true_yes + self.true_no, self.items),
            "precision": 100 * precision,
            "recall": 100 * recall,
            "yes_ratio": 100 * _ratio(self.label_yes if lmms else self.true_yes + self.false_yes, self.items),
        }


class POPE(Benchmark):
    """`f1` and `accuracy` times 100, each the unweighted mean over the categories; then the same metrics a category.

    LLaVA reports the mean F1 (85.9), TinyLLaVA Factory the mean accuracy: compare like with like. `lmms` pools all items.
    """

    name: ClassVar[str] = "pope"
    variants: ClassVar[tuple[str, ...]] = ("llava", "official", "lmms")
    headline: ClassVar[str] = "f1"
    max_new_tokens: ClassVar[int] = 128

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read questions, and labels paired by category, image and question.

        Raises:
            DataError: also where a question has no label: the label files are of another POPE version.
        """
        files = BenchmarkFiles.under(root, GET, "pope")
        if layout == "hf":
            return self._load_hf(files)
        questions = read_questions(files.file(QUESTIONS))
        folder = files.image_folder("val2014")
        labels: dict[str, dict[tuple[str, str], str]] = {}
        items = []
        for name, row in zip(unique_ids(question["question_id"] for question in questions), questions, strict=True):
            category, question = row.get("category"), question_in(row["text"])
            where = f"{QUESTIONS}, question {name}"
            if category not in CATEGORIES:
                raise DataError(f"{where}: category {category!r}; allowed: {', '.join(CATEGORIES)}. {GET}")
            if category not in labels:
                labels[category] = _read_labels(files, category)
            label = labels[category].get((row["image"], question))
            if label is None:
                raise DataError(
                    f"{where}: coco_pope_{category}.json has no label for {question!r} about {row['image']}. {GET}"
                )
            image = image_file(folder, row["image"], where)
            items.append(Item(name, row["question_id"], row["text"], (image,), category, label, 2, group=row["image"]))
        return items

    def _load_hf(self, files: BenchmarkFiles) -> list[Item]:
        if files.has_parquet("test"):
            paths = files.parquet("test")
        else:
            paths = [path for category in CATEGORIES for path in files.parquet(category, "Full")]
        rows = read_parquet(paths, ("question_id", "question", "answer", "category"), ("id", "image_source"))
        ids = [row.values["question_id"] for row in rows]
        if len(set(ids)) < len(ids) and all(row.values["id"] is not None for row in rows):
            ids = [row.values["id"] for row in rows]  # question_id starts anew in every category
        items = []
        for name, number, row in zip(unique_ids(ids), ids, rows, strict=True):
            label = _label(row.values["answer"], row.where)
            text = row.values["question"].strip() + SHORT_ANSWER
            group = row.values["image_source"] or ""
            items.append(Item(name, number, text, (row.image(),), row.values["category"], label, 2, group=group))
        return items

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score; never divides by zero, also where every answer is "no"."""
        variant = pick_variant(self, variant)
        parse = lmms_answer if variant == "lmms" else official_answer
        rows = []
        for item in items:
            answer = answers.get(item.item_id)
            parsed = None if answer is None else parse(answer.text)
            rows.append(ItemScore(item.item_id, float(parsed == item.reference), parsed))
        metrics = _metrics(list(zip(items, rows, strict=True)), variant == "lmms")
        counts = count_items(items, answers, rows)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)

    def group_of(self, item: Item) -> str:
        """As `Benchmark.group_of`: an image, with as many yes as no in each category; alone where its name is not known."""
        return item.group or item.item_id


Rows = Sequence[tuple[Item, ItemScore]]


def _metrics(rows: Rows, lmms: bool) -> Metrics:
    """Over all questions (lmms-eval pools them, LLaVA takes the mean over the categories), then a category at a time."""
    metrics = Metrics(digits=None)
    categories: dict[str, list[tuple[Item, ItemScore]]] = {}
    for item, row in sorted(rows, key=lambda pair: _order(pair[0])):
        categories.setdefault(item.category, []).append((item, row))
    each = {name: _confusion(within).metrics(lmms) for name, within in categories.items()}
    equal = len({len(within) for within in categories.values()}) <= 1
    _add(metrics, "", rows, _confusion(rows).metrics(lmms=True) if lmms else _means(list(each.values())), lmms or equal)
    for name, within in categories.items():
        _add(metrics, f"{name}/", within, each[name], plain=True)
    return metrics


def _add(metrics: Metrics, prefix: str, rows: Rows, values: Mapping[str, float], plain: bool) -> None:
    """Add the metrics of some questions; `plain` where their accuracy is the mean over them."""
    for name, value in values.items():
        if name == "accuracy" and plain:
            metrics.mean(f"{prefix}{name}", [(item, row.score or 0.0) for item, row in rows])
        else:
            metrics.other(f"{prefix}{name}", value, (item for item, _ in rows))


def _confusion(rows: Rows) -> Confusion:
    confusion = Confusion()
    for item, row in rows:
        confusion.add(row.parsed, item.reference)
    return confusion


def _order(item: Item) -> int:
    return CATEGORIES.index(item.category) if item.category in CATEGORIES else len(CATEGORIES)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = list(Confusion().metrics(lmms=False))
    return {name: sum(row[name] for row in rows) / max(1, len(rows)) for name in names}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _read_labels(files: BenchmarkFiles, category: str) -> dict[tuple[str, str], str]:
    name = f"coco_pope_{category}.json"
    path = files.file(f"coco/{name}", name)
    labels: dict[tuple[str, str], str] = {}
    for number, row in enumerate(read_jsonl(path, ("image", "text", "label")), 1):
        key, label = (row["image"], question_in(row["text"])), _label(row["label"], f"{path}, line {number}")
        if labels.setdefault(key, label) != label:
            raise DataError(f"{path}, line {number}: {key[1]!r} about {key[0]} has both labels. {GET}")
    return labels


def _label(value: Any, where: str) -> str:
    label = str(value).lower().strip()
    if label not in ("yes", "no"):
        raise DataError(f"{where}: label {value!r}; allowed: yes, no. {GET}")
    return label
