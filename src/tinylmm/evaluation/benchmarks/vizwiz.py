"""VizWiz VQA: test uploaded to EvalAI as LLaVA does, val scored locally.

Sources: LLaVA's convert_vizwiz_for_submission.py; VizWiz's annotation files; lmms-eval's vizwiz_vqa.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import ConfigError, DataError, Fault
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import ParquetRow, image_file, read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.free_text import (
    FreeTextReference,
    answer_texts,
    m4c_rule,
    official_rule,
    score_free_text,
    uploaded_rule,
)
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import unique_ids
from tinylmm.evaluation.benchmarks.prompts import SHORT_ANSWER, read_questions
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, Scores
from tinylmm.evaluation.benchmarks.scoring import pick_variant
from tinylmm.evaluation.benchmarks.vqa_text import m4c_text

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "llava_test.jsonl is in LLaVA's eval.zip; val.json and the images are on vizwiz.org (tasks-and-datasets/vqa)."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
QUESTIONS = "llava_test.jsonl"
ANNOTATIONS = ("val.json", "Annotations/val.json", "annotations/val.json")
RULES = {"llava": uploaded_rule, "official": official_rule, "lmms": m4c_rule}


class VizWiz(Benchmark):
    """Soft accuracy in percent on val, by answer type. The answers of test, which papers report, are hidden: no metric."""

    name: ClassVar[str] = "vizwiz"
    variants: ClassVar[tuple[str, ...]] = tuple(RULES)
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 128
    upload: ClassVar[str] = "json"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read the chosen split, else test where LLaVA's question file is there, else val."""
        files = BenchmarkFiles.under(root, GET, "vizwiz")
        split = self.chosen_split(root, layout)
        if layout == "hf":
            return _load_hf(files, split)
        if split == "val":
            return _load_val(files)
        questions = read_questions(files.file(QUESTIONS))
        folder = files.image_folder("test")
        items = []
        for name, row in zip(unique_ids(q["question_id"] for q in questions), questions, strict=True):
            image = image_file(folder, row["image"], f"{QUESTIONS}, question {name}")
            items.append(Item(name, row["question_id"], row["text"], (image,), reference=FreeTextReference()))
        return items

    def chosen_split(self, root: Path, layout: Format = "llava") -> str:
        """As `Benchmark.chosen_split`."""
        files = BenchmarkFiles.under(root, GET, "vizwiz")
        if layout == "hf":
            return self.split or ("test" if files.has_parquet("test") else "val")
        return self.split or ("val" if files.find(*ANNOTATIONS) and not files.find(QUESTIONS) else "test")

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by `variant`: `llava` normalises the answer by m4c first, `lmms` also the references, always."""
        variant = pick_variant(self, variant)
        return score_free_text(self, items, answers, variant, RULES[variant])

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write EvalAI's JSON: `[{"image", "answer"}]`, one for every question of test.

        Raises:
            ConfigError: the items are val's.
            DataError: a question has no answer; the server takes complete files only.
        """
        if any(item.reference.answers for item in items):
            raise ConfigError([Fault("split", "val is scored locally and has no upload.", "Load test.")])
        missing = [item.item_id for item in items if item.item_id not in answers]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(items)} questions have no answer, e.g. {missing[0]}. Answer them first."
            )
        rows = [{"image": _image_name(item), "answer": m4c_text(answers[item.item_id].text)} for item in items]
        path.write_text(json.dumps(rows), encoding="utf-8")


def _image_name(item: Item) -> str:
    """The image as the server knows it; in parquet files the question id is its name without the ending."""
    image = item.images[0]
    return image.path.name if image.row is None else f"{item.question_id}.jpg"


def _load_val(files: BenchmarkFiles) -> list[Item]:
    path = files.file(*ANNOTATIONS)
    folder = files.image_folder("val")
    items = []
    for number, record in enumerate(read_list(path), 1):
        where = f"{path}, record {number}"
        require(record, ("image", "question", "answers"), where)
        reference = _reference(record, record.get("answer_type"))
        image = image_file(folder, record["image"], where)
        # an image has one question, so its name is the id
        items.append(_item(record["image"], record["image"], record["question"], image, reference))
    return items


def _load_hf(files: BenchmarkFiles, split: str) -> list[Item]:
    rows = read_parquet(files.parquet(split), ("question_id", "question"), ("answers", "category"))
    names = unique_ids(row.values["question_id"] for row in rows)
    return [_hf_item(row, name) for name, row in zip(names, rows, strict=True)]


def _hf_item(row: ParquetRow, name: str) -> Item:
    reference = _reference(row.values, row.values["category"])
    return _item(name, row.values["question_id"], row.values["question"], row.image(), reference)


def _item(name: str, question_id: Any, question: str, image: Any, reference: FreeTextReference) -> Item:
    category = (reference.groups or {}).get("answer_type", "")
    # LLaVA's question file has str.capitalize() applied ("Ok let me see. so tell me what i took")
    return Item(name, question_id, question.capitalize() + UNANSWERABLE + SHORT_ANSWER, (image,), category, reference)


def _reference(record: Mapping[str, Any], answer_type: str | None) -> FreeTextReference:
    return FreeTextReference(answer_texts(record["answers"]), {"answer_type": answer_type} if answer_type else None)
