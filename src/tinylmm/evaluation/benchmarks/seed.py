"""SEED-Bench: multiple-choice questions about images and, in LLaVA's file, about the middle frames of videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, lettered, listing
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "llava-seed-bench.jsonl is in LLaVA's eval.zip; SEED-Bench.json and the images (SEED-Bench-image/) are in "
    "https://huggingface.co/datasets/AILab-CVC/SEED-Bench. In Hugging Face's layout: lmms-lab/SEED-Bench."
)
_FIELDS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type")
_LETTERS = "ABCD"


class SEED(Benchmark):
    """SEED-Bench.

    Variants: `llava` (the whole text must be the letter), `lmms` (the first character after stripping, in
    either case).
    Aggregate: `image` (what is reported as SEED^I), then, if there are such questions, `video` and `all`; and one metric a
    question type; percent.
    """

    name = "seed"
    variants = ("llava", "lmms")
    rules: ClassVar[Mapping[str, int]] = {"lmms": 2}
    headline = "image"
    max_new_tokens = 128
    upload = "jsonl"

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `seed_bench/llava-seed-bench.jsonl` with SEED-Bench.json (alone, prompts are built from it), or the parquet.

        Video questions are asked about their middle frame. Where the images are there but the folder of frames
        (SEED-Bench-video-image) is not, they are left out, and so are answers to them.
        """
        files = BenchmarkFiles.under(root, GET, "seed_bench", "SEED-Bench", "seed")
        return _load_hf(files) if layout == "hf" else _load_llava(files)

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        rows = []
        for item in items:
            answer = answers.get(item.item_id)
            text = (answer.text.strip()[:1].upper() if variant == "lmms" else answer.text) if answer else ""
            rows.append(
                ItemScore(
                    item.item_id,
                    float(text == item.reference["answer"]),
                    text if len(text) == 1 and text in _LETTERS else None,
                )
            )
        metrics, found = Metrics(), graded(items, rows)
        videos = [row for row in found if row[0].reference["data_type"] == "video"]
        metrics.mean("image", [row for row in found if row[0].reference["data_type"] == "image"])
        if videos:
            metrics.mean("video", videos)
            metrics.mean("all", found)
        metrics.means_by("type", found, lambda item: item.category)
        counts = count_items(items, answers, rows)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)

    def pair(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """By question id; without video questions among the items, answers to other questions are theirs and pass by."""
        if not any(item.reference["data_type"] == "video" for item in items):
            known = {str(item.question_id) for item in items}
            rows = [row for row in rows if str(row["question_id"]) in known]
        return super().pair(items, rows)

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write what LLaVA's convert_seed_for_submission.py writes: JSONL of question_id and prediction, every question."""
        with path.open("w", encoding="utf-8") as file:
            for item in items:
                answer = answers.get(item.item_id)
                record = {"question_id": item.reference["id"], "prediction": answer.text if answer else ""}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _load_llava(files: BenchmarkFiles) -> list[Item]:
    path = files.file("SEED-Bench.json")
    data = read_object(path, "questions")
    require(data.get("question_type", {}), (), f"{path}, question_type")
    type_names = {number: name for name, number in data.get("question_type", {}).items()}
    records = {}
    for number, record in enumerate(data["questions"], 1):
        require(record, _FIELDS, f"{path}, question {number}")
        records[str(record["question_id"])] = record
    base, frames = files.image_folder("."), files.find("SEED-Bench-video-image")
    drop_videos = frames is None and files.find("SEED-Bench-image") is not None
    asked_path = files.find("llava-seed-bench.jsonl")
    if asked_path is None:
        asked = [_built_question(record) for record in records.values()]
    else:
        asked = read_jsonl(asked_path, ("question_id", "image", "text"))
    items = []
    for number, question in enumerate(asked, 1):
        where = f"{asked_path or path}, question {number}"
        record = records.get(str(question["question_id"]))
        if record is None:
            raise DataError(f"{where}: question_id {question['question_id']} is not in {path}. Fetch both files again.")
        if drop_videos and record["data_type"] == "video":
            continue
        category = type_names.get(record.get("question_type_id"), record.get("question_type_id", ""))
        image = image_file(base, question["image"], where)
        items.append(_item(record, question["question_id"], question["text"], str(category), image))
    return items


def _built_question(record: Mapping[str, Any]) -> dict[str, Any]:
    folder = "SEED-Bench-image" if record["data_type"] == "image" else "SEED-Bench-video-image"
    return {
        "question_id": record["question_id"],
        "image": f"{folder}/{record.get('data_id', record['question_id'])}",
        "text": _prompt(record),
    }


def _prompt(record: Mapping[str, Any]) -> str:
    options = lettered(record[f"choice_{letter.lower()}"] for letter in _LETTERS)
    return f"{record['question']}\n{listing(options)}\n{LETTER_SUFFIX}"


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    """Image questions only: of videos the parquet holds eight frames, and LLaVA's protocol shows one."""
    rows = read_parquet(files.parquet("test"), _FIELDS, ("question_type_id",))
    items = []
    for row in rows:
        values = row.values
        if values["data_type"] == "image":
            category = str(values["question_type_id"] or "")
            image = row.image()
            items.append(_item(values, values["question_id"], _prompt(values), category, image))
    return items


def _item(record: Mapping[str, Any], question_id: str | int, prompt: str, category: str, image: ImageRef) -> Item:
    return Item(
        item_id=str(question_id),
        question_id=question_id,
        prompt=prompt,
        images=(image,),
        category=category,
        reference={"answer": record["answer"], "data_type": record["data_type"], "id": record["question_id"]},
        options=len(_LETTERS),
    )
