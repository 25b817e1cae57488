"""VQAv2: val scored locally by the official rule; test-dev and test uploaded to EvalAI (challenge 830), which papers report.

Sources: VQA's vqaEval.py; LLaVA's convert_vqav2_for_submission.py; lmms-eval's vqav2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import ConfigError, DataError, Fault
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import ParquetRow, image_file, read_jsonl, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.free_text import (
    FreeTextReference,
    always_rule,
    answer_texts,
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

GET = (
    "Questions and annotations come from visualqa.org/download.html, LLaVA's question files from eval.zip "
    "(docs/Evaluation.md of LLaVA)."
)
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
QUESTIONS = {
    "val": ("llava_vqav2_mscoco_val2014.jsonl", "v2_OpenEnded_mscoco_val2014_questions.json"),
    "test-dev": ("llava_vqav2_mscoco_test-dev2015.jsonl", "v2_OpenEnded_mscoco_test-dev2015_questions.json"),
    "test": ("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json"),
}
"""Question files by split; the server wants an answer to every question of `test`, whichever were asked."""
IMAGES = {"val": "val2014", "test-dev": "test2015", "test": "test2015"}
HF_SPLITS = {"val": "validation", "test-dev": "testdev", "test": "test"}
RULES = {"official": official_rule, "llava": uploaded_rule, "lmms": always_rule}


class VQAv2(Benchmark):
    """Soft accuracy in percent, overall and by answer and question type.

    `official` is the default, as val is scored by nothing else; `llava` first normalises the answer as LLaVA does before an
    upload; `lmms` normalises also where all ten references are equal. Answers of test-dev and test are hidden: no metric.
    """

    name: ClassVar[str] = "vqav2"
    variants: ClassVar[tuple[str, ...]] = tuple(RULES)
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 128
    upload: ClassVar[str] = "json"
    splits: ClassVar[tuple[str, ...]] = tuple(QUESTIONS)

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read the chosen split, else val where its annotations and questions are there, else test-dev, else test."""
        files, split = BenchmarkFiles.under(root, GET, "vqav2"), self.chosen_split(root, layout)
        if layout == "hf":
            return _load_hf(files, split)
        questions = _read_question_file(files.file(*QUESTIONS[split]), split)
        references = self._references(files, split)
        upload = None if split == "val" else files.find(*QUESTIONS["test"])
        folder = files.image_folder(IMAGES[split])
        names = unique_ids(question["question_id"] for question in questions)
        items = []
        for name, question in zip(names, questions, strict=True):
            where = f"question {name} of {split}"
            reference = references.get(str(question["question_id"]))
            if reference is None and split == "val":
                raise DataError(f"{where}: {ANNOTATIONS} has no answers to it. {GET}")
            reference = reference or FreeTextReference(upload_list=upload)
            image = image_file(folder, question["image"], where)
            category = (reference.groups or {}).get("answer_type", "")
            items.append(Item(name, question["question_id"], question["text"], (image,), category, reference))
        return items

    def chosen_split(self, root: Path, layout: Format = "llava") -> str:
        """As `Benchmark.chosen_split`."""
        files = BenchmarkFiles.under(root, GET, "vqav2")
        if layout == "hf":
            present = [split for split in self.splits if files.has_parquet(HF_SPLITS[split])]
        else:
            present = [split for split in self.splits if files.find(*QUESTIONS[split])]
            if files.find(ANNOTATIONS) is None and "val" in present and len(present) > 1:
                present.remove("val")
        return self.split or next(iter(present), "val")

    @staticmethod
    def _references(files: BenchmarkFiles, split: str) -> dict[str, FreeTextReference]:
        """References by question id; also of test-dev questions, where val's annotations lie beside them alone."""
        if split == "val":
            return _read_annotations(files.file(ANNOTATIONS))
        found = files.find(ANNOTATIONS)
        return _read_annotations(found) if found and not files.find(*QUESTIONS["val"]) else {}

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by `variant`; see the class."""
        variant = pick_variant(self, variant)
        return score_free_text(self, items, answers, variant, RULES[variant])

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write EvalAI's JSON: `[{"question_id", "answer"}]` over all test2015 questions, "" where none was asked.

        Raises:
            ConfigError: the items are val's, which are scored locally.
            DataError: the list of all test questions is missing, or lacks an answered one.
        """
        if any(item.reference.answers for item in items):
            raise ConfigError([Fault("split", "val is scored locally and has no upload.", "Load test-dev or test.")])
        upload = next((item.reference.upload_list for item in items), None)
        if upload is None:
            raise DataError(
                f"{' or '.join(QUESTIONS['test'])} not found: the upload covers all test2015 questions. {GET}"
            )
        texts = {str(i.question_id): m4c_text(answers[i.item_id].text) for i in items if i.item_id in answers}
        listed = _read_ids(upload)
        unknown = texts.keys() - set(map(str, listed))
        if unknown:
            raise DataError(f"{upload}: lacks {len(unknown)} answered questions, e.g. {min(unknown)}. {GET}")
        try:
            rows = [{"question_id": int(name), "answer": texts.get(str(name), "")} for name in listed]
        except ValueError as error:
            raise DataError(f"{upload}: a question_id is no number ({error}). {GET}") from error
        path.write_text(json.dumps(rows), encoding="utf-8")


def _read_question_file(path: Path, split: str) -> list[dict[str, Any]]:
    """Questions as LLaVA writes them, from its file or from the official one."""
    if path.suffix == ".jsonl":
        return read_questions(path)
    questions = []
    for number, question in enumerate(read_object(path, "questions")["questions"], 1):
        require(question, ("question_id", "image_id", "question"), f"{path}, question {number}")
        questions.append(
            {
                "question_id": question["question_id"],
                "image": f"COCO_{IMAGES[split]}_{int(question['image_id']):012d}.jpg",
                "text": question["question"] + SHORT_ANSWER,
            }
        )
    return questions


def _read_ids(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return [row["question_id"] for row in read_jsonl(path, ("question_id",))]
    return [question["question_id"] for question in read_object(path, "questions")["questions"]]


def _read_annotations(path: Path) -> dict[str, FreeTextReference]:
    references = {}
    for number, record in enumerate(read_object(path, "annotations")["annotations"], 1):
        require(record, ("question_id", "answers"), f"{path}, annotation {number}")
        references[str(record["question_id"])] = _reference(record)
    return references


def _reference(record: Mapping[str, Any]) -> FreeTextReference:
    groups = {name: record[name] for name in ("answer_type", "question_type") if record.get(name)}
    return FreeTextReference(answer_texts(record.get("answers")), groups)


def _load_hf(files: BenchmarkFiles, split: str) -> list[Item]:
    rows = read_parquet(
        files.parquet(HF_SPLITS[split]), ("question_id", "question"), ("answers", "answer_type", "question_type")
    )
    upload = None if split == "val" else files.find(*QUESTIONS["test"])
    names = unique_ids(row.values["question_id"] for row in rows)
    return [_hf_item(row, name, upload) for row, name in zip(rows, names, strict=True)]


def _hf_item(row: ParquetRow, name: str, upload: Path | None) -> Item:
    values = row.values
    reference = _reference(values) if values["answers"] else FreeTextReference(upload_list=upload)
    category = (reference.groups or {}).get("answer_type", "")
    return Item(name, values["question_id"], values["question"] + SHORT_ANSWER, (row.image(),), category, reference)
