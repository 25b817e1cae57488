"""TextVQA val (5,000 questions), with the OCR tokens that LLaVA's prompts carry, or without.

Sources: LLaVA's eval_textvqa.py and m4c_evaluator.py; lmms-eval's textvqa (without tokens by default, so not comparable).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.free_text import FreeTextReference, answer_texts, m4c_rule, score_free_text
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import pair_by_prompt, unique_ids
from tinylmm.evaluation.benchmarks.prompts import SHORT_ANSWER, read_questions
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, Scores
from tinylmm.evaluation.benchmarks.scoring import pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "The question file is in LLaVA's eval.zip, TextVQA_0.5.1_val.json on textvqa.org/dataset."
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR_LINE = "Reference OCR token: "
ANNOTATORS = 10


class TextVQA(Benchmark):
    """Soft accuracy in percent, m4c-normalised on both sides; all variants score alike.

    Args:
        ocr: whether prompts carry the Rosetta tokens of the data set. Papers' scores do; without them a model loses
            several points (TinyLLaVA-3.1B 60.3 against 55.8), so name it beside the score.
    """

    name: ClassVar[str] = "textvqa"
    variants: ClassVar[tuple[str, ...]] = ("llava", "official", "lmms")
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 128
    splits: ClassVar[tuple[str, ...]] = ("val",)

    def __init__(self, split: str | None = None, ocr: bool = True) -> None:
        super().__init__(split)
        self.ocr = ocr

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read LLaVA's question file beside the annotations, or the parquet columns.

        A question file's id is the image's, which several questions share: annotations are found by image and question.
        """
        files = BenchmarkFiles.under(root, GET, "textvqa")
        if layout == "hf":
            return self._load_hf(files)
        questions = read_questions(files.file(QUESTIONS))
        references = _read_annotations(files.file(ANNOTATIONS))
        folder = files.image_folder("train_images")
        names = unique_ids(question["question_id"] for question in questions)
        items = []
        for name, row in zip(names, questions, strict=True):
            question = question_of(row["text"])
            where = f"{QUESTIONS}, question {name}"
            found = references.get((str(row["question_id"]), question))
            if found is None:
                raise DataError(f"{where}: {ANNOTATIONS} has no question {question!r} about this image. {GET}")
            text = row["text"] if self.ocr else _without_ocr(row["text"])
            image = image_file(folder, row["image"], where)
            reference = FreeTextReference(found.answers)
            items.append(
                Item(name, row["question_id"], text, (image,), reference=reference, other_ids=found.question_ids)
            )
        return items

    def _load_hf(self, files: BenchmarkFiles) -> list[Item]:
        paths = files.parquet("validation")
        rows = read_parquet(paths, ("question_id", "question", "answers"), ("image_id", "ocr_tokens"))
        items = []
        for name, row in zip(unique_ids(row.values["question_id"] for row in rows), rows, strict=True):
            answers = _ten(row.values["answers"], row.where)
            ocr = f"\n{OCR_LINE}{', '.join(row.values['ocr_tokens'] or ())}" if self.ocr else ""
            text = row.values["question"].capitalize() + ocr + SHORT_ANSWER
            reference = FreeTextReference(answers)
            items.append(Item(name, row.values["question_id"], text, (row.image(),), reference=reference))
        return items

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score; the variants name protocols that differ in prompts only."""
        return score_free_text(self, items, answers, pick_variant(self, variant), m4c_rule)

    def pair(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Answer]:
        """Match by TextVQA's own question id, else by image id and the question in the prompt, as LLaVA's script does."""
        return pair_by_prompt(items, rows, question_of)


def question_of(prompt: str) -> str:
    """The question in a prompt, lower case: of two or three lines (tokens first or second), or an `OCR tokens:` prompt.

    Any other prompt comes back as it is, and is then found nowhere.
    """
    prompt = prompt.removeprefix("<image>\n")
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        question = match[1] if match else prompt
    elif OCR_LINE in prompt and len(lines) == 3:
        question = lines[1] if prompt.startswith(OCR_LINE.strip()) else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    else:
        question = prompt
    return question.strip().lower()


def _without_ocr(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith(OCR_LINE.strip()))


@dataclass(frozen=True)
class _Annotation:
    answers: tuple[str, ...]
    question_ids: tuple[str, ...]


def _read_annotations(path: Path) -> dict[tuple[str, str], _Annotation]:
    references = {}
    for number, record in enumerate(read_object(path, "data")["data"], 1):
        where = f"{path}, record {number}"
        require(record, ("image_id", "question", "answers"), where)
        key = (str(record["image_id"]), str(record["question"]).strip().lower())
        own_id = (str(record["question_id"]),) if "question_id" in record else ()
        references[key] = _Annotation(_ten(record["answers"], where), own_id)
    return references


def _ten(answers: Any, where: str) -> tuple[str, ...]:
    texts = answer_texts(answers)
    if len(texts) != ANNOTATORS:
        raise DataError(f"{where}: {len(texts)} answers where TextVQA val has {ANNOTATORS}. {GET}")
    return texts
