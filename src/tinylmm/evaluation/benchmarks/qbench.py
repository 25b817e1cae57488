"""Q-Bench, perception (LLVisionQA): multiple-choice questions about how an image looks, dev split, 1,495 questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, LETTERS, guess, lettered, listing, parse_listed
from tinylmm.evaluation.benchmarks.files import image_file, read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "llvisionqa_dev.json and images_llvisionqa.tar are in https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench. "
    "In Hugging Face's layout: q-future/Q-Bench-HF."
)
_TYPES = ("Yes/No", "How", "What")
_CONCERNS = ("Global Distortion", "Global Others", "Local Distortion", "Local Others")
"""Names by number, as lmms-eval gives them for the parquet file; taken to be the same in the JSON file."""


class QBench(Benchmark):
    """Q-Bench perception, dev.

    The official accuracy asks a GPT model whether answer and truth mean the same; that prompt is not part of this project, so
    both variants read letters: `mmmu` (MMMU's parser on the LLaVA prompt) and `lmms` (lmms-eval: `X ` and `X.` count anywhere).
    Neither is comparable with GPT-judged scores where models answer in sentences.
    Aggregate: `accuracy`, and by question type and concern where the file tells them; percent.
    """

    name = "qbench"
    variants = ("mmmu", "lmms")
    headline = "accuracy"
    max_new_tokens = 1024

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `qbench/llvisionqa_dev.json` (prompt of model_vqa_qbench.py), or the dev parquet (lmms-eval's prompt)."""
        files = BenchmarkFiles.under(root, GET, "qbench", "Q-Bench")
        return _load_hf(files) if layout == "hf" else _load_json(files)

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters; an unparsed answer is guessed from the item's id and counted."""
        variant = pick_variant(self, variant)
        rows, guessed = [], 0
        for item in items:
            answer = answers.get(item.item_id)
            options = item.reference["options"]
            letter = parse_listed(answer.text, options, loose=variant == "lmms") if answer else None
            chosen = letter
            if answer and letter is None:
                guessed += 1
                chosen = guess(item.item_id, list(options))
            rows.append(ItemScore(item.item_id, float(chosen == item.reference["answer"]), letter))
        metrics, found = Metrics(), graded(items, rows)
        metrics.mean("accuracy", found)
        metrics.means_by("type", found, lambda item: str(item.reference["type"]))
        metrics.means_by("concern", found, lambda item: str(item.reference["concern"]))
        counts = count_items(items, answers, rows, guessed=guessed)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)


def _load_json(files: BenchmarkFiles) -> list[Item]:
    path = files.file("llvisionqa_dev.json")
    # LLaVA's page on evaluation and its script spell the folder differently
    folder = files.image_folder("images_llvisionqa", "images_llviqionqa", "images")
    items = []
    for number, record in enumerate(read_list(path)):
        where = f"{path}, record {number + 1}"
        require(record, ("img_path", "question", "candidates", "correct_ans"), where)
        if not isinstance(record["candidates"], list):
            raise DataError(f"{where}: candidates {record['candidates']!r} are no list. Fetch the file again.")
        options = lettered(str(text) for text in record["candidates"])
        right = [letter for letter, text in options.items() if text == record["correct_ans"]]
        if not right:
            raise DataError(f"{where}: correct_ans {record['correct_ans']!r} is no candidate. Fetch the file again.")
        prompt = f"{record['question']}\nChoose between one of the options as follows:\n{listing(options)}\n"
        kind, concern = record.get("type"), record.get("concern")
        items.append(
            Item(
                item_id=str(record.get("question_id", number)),
                question_id=record.get("question_id", number),
                prompt=prompt,
                images=(image_file(folder, record["img_path"], where),),
                category=_named(_TYPES, kind),
                reference={
                    "options": options,
                    "answer": right[0],
                    "type": _named(_TYPES, kind),
                    "concern": _named(_CONCERNS, concern),
                },
                options=len(options),
            )
        )
    return items


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    fields = ("id", "question", "option0", "option1", "option2", "option3", "correct_choice")
    rows = read_parquet(files.parquet("dev"), fields, ("question_type", "question_concern"))
    items = []
    for row in rows:
        values = row.values
        texts = [values[f"option{number}"] for number in range(4)]
        options = lettered(text for text in texts if text not in (None, "N/A"))
        answer = str(values["correct_choice"])
        if answer not in LETTERS[: len(options)]:
            raise DataError(f"{row.where}: correct_choice {answer!r} is no option's letter. Fetch the file again.")
        kind = _named(_TYPES, values["question_type"])
        concern = _named(_CONCERNS, values["question_concern"])
        items.append(
            Item(
                item_id=str(values["id"]),
                question_id=values["id"],
                prompt=f"{values['question']}\n{listing(options)}\n{LETTER_SUFFIX}",
                images=(row.image(),),
                category=kind,
                reference={"options": options, "answer": answer, "type": kind, "concern": concern},
                options=len(options),
            )
        )
    return items


def _named(names: Sequence[str], number: object) -> str:
    if isinstance(number, int) and 0 <= number < len(names):
        return names[number]
    return "" if number is None else str(number)
