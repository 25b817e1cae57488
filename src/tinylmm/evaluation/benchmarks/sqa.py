"""ScienceQA: multiple-choice science questions, with and without an image. Papers report the accuracy over those with one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, LETTERS, infer_vlmeval, lettered, listing
from tinylmm.evaluation.benchmarks.files import image_file, read_list, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "llava_test_CQM-A.json is in LLaVA's eval.zip; images, pid_splits.json and problems.json are in data/scienceqa of "
    "https://github.com/lupantech/ScienceQA. In Hugging Face's layout: lmms-lab/ScienceQA."
)
_CHOICES = 5
_STATED = re.compile(r"The answer is ([A-Z]).")


def parse_llava(text: str) -> str | None:
    """LLaVA's `eval_science_qa.py`: a bare letter, `X. ...`, or exactly one `The answer is X` with a character after it.

    Nothing is stripped or folded: "B.", "(B)", "b" and " B" cannot be read.
    """
    if len(text) == 1 and text in LETTERS[:_CHOICES]:
        return text
    if text[:1] and text[0] in LETTERS[:_CHOICES] and text[1:3] == ". ":
        return text[0]
    stated = _STATED.findall(text)
    return stated[0] if len(stated) == 1 else None


def parse_lmms(text: str) -> str | None:
    """lmms-eval: a letter of either case, or `X.` in front; the space after the stop may be missing."""
    text = text.strip()
    if len(text) == 1 and text.upper() in LETTERS:
        return text.upper()
    if len(text) >= 2 and text[0] in LETTERS and text[1] == ".":
        return text[0]
    return None


class SQA(Benchmark):
    """ScienceQA, test split: 4,241 questions, 2,017 of them with an image.

    Variants: `llava` (LLaVA and TinyLLaVA), `lmms`, `vlmeval` (VLMEvalKit, exact matching).
    Aggregate: `img_accuracy` over questions with an image, `accuracy` over all, and one metric a subject where
    problems.json tells them; percent. A question counts as one with an image by the question file, not by what the answer
    file says was asked. A letter outside the choices is wrong, never a guess.
    """

    name = "sqa"
    variants = ("llava", "lmms", "vlmeval")
    rules: ClassVar[Mapping[str, int]] = {"vlmeval": 2}
    headline = "img_accuracy"
    max_new_tokens = 1024

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `scienceqa/llava_test_CQM-A.json` (and problems.json, pid_splits.json if there), or lmms-lab/ScienceQA.

        With pid_splits.json, questions outside its test split take no part. Parquet rows have no id: theirs is the row's
        number.
        """
        files = BenchmarkFiles.under(root, GET, "scienceqa", "ScienceQA", "sqa")
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
        read = _READERS[variant]
        rows = []
        for item in items:
            answer = answers.get(item.item_id)
            letter = read(answer.text, item.reference["options"]) if answer else None
            if letter is not None and LETTERS.index(letter) >= item.options:
                letter = None
            taking_part = item.reference["in_split"]
            rows.append(
                ItemScore(item.item_id, float(letter == item.reference["answer"]) if taking_part else None, letter)
            )
        metrics, found = Metrics(), graded(items, rows)
        metrics.mean("img_accuracy", [row for row in found if row[0].reference["has_image"]])
        metrics.mean("accuracy", found)
        metrics.means_by("subject", found, lambda item: item.category)
        counts = count_items(items, answers, rows)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)


_READERS: dict[str, Callable[[str, Mapping[str, str]], str | None]] = {
    "llava": lambda text, options: parse_llava(text),
    "lmms": lambda text, options: parse_lmms(text),
    "vlmeval": infer_vlmeval,
}


def _load_llava(files: BenchmarkFiles) -> list[Item]:
    path = files.file("llava_test_CQM-A.json")
    problems_path, splits_path = files.find("problems.json"), files.find("pid_splits.json")
    problems = read_object(problems_path) if problems_path else {}
    split = None
    if splits_path:
        split = {str(pid) for pid in read_object(splits_path, "test")["test"]}
    folder = files.image_folder("images/test", "test", "images")
    items = []
    for number, record in enumerate(read_list(path), 1):
        where = f"{path}, record {number}"
        require(record, ("id", "conversations"), where)
        items.append(_llava_item(record, where, folder, problems, split))
    return items


def _llava_item(
    record: Mapping[str, Any], where: str, folder: Path, problems: Mapping[str, Any], split: set[str] | None
) -> Item:
    pid = str(record["id"])
    turns = record["conversations"]
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) and "value" in turn for turn in turns)
    ):
        raise DataError(f"{where}: `conversations` must list turns with a `value`. Correct the record.")
    question = str(turns[0]["value"]).replace("<image>", "").strip()
    problem = problems.get(pid)
    if problem is not None:
        require(problem, ("choices", "answer"), f"problems.json, problem {pid}")
        options, answer = _choices(problem["choices"], problem["answer"], f"problems.json, problem {pid}")
    else:
        options = dict(re.findall(r"^\(?([A-E])[.)] ?(.*)$", question, re.MULTILINE))
        answer = (parse_llava(str(turns[1]["value"]).strip()) or "") if len(turns) > 1 else ""
    if not options or answer not in options:
        raise DataError(
            f"{where}: no answer among its choices ({', '.join(options) or 'none'}). Put problems.json there."
        )
    images: tuple[ImageRef, ...] = ()
    if record.get("image"):
        images = (image_file(folder, record["image"], where),)
    has_image = bool(images) or "<image>" in str(turns[0]["value"])
    return Item(
        item_id=pid,
        question_id=record["id"],
        prompt=f"{question}\n{LETTER_SUFFIX}",
        images=images,
        category=str((problem or {}).get("subject", "")),
        reference={"answer": answer, "options": options, "has_image": has_image, "in_split": not split or pid in split},
        options=len(options),
    )


def _choices(choices: Any, answer: Any, where: str) -> tuple[dict[str, str], str]:
    """Options by letter, and the letter of the right one."""
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer {answer!r} is no index into choices {choices!r}. Fetch the file again.")
    return lettered(map(str, choices)), LETTERS[answer]


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    shards = files.parquet("test", "ScienceQA-FULL", "ScienceQA-IMG")
    rows = read_parquet(shards, ("question", "choices", "answer"), ("hint", "subject"))
    pictured = [has for shard in shards for has in _filled(shard, "image")]
    items = []
    for number, (row, has_image) in enumerate(zip(rows, pictured, strict=True)):
        options, answer = _choices(row.values["choices"], row.values["answer"], row.where)
        hint = f"Context: {row.values['hint']}\n" if row.values["hint"] else ""
        items.append(
            Item(
                item_id=str(number),
                question_id=number,
                prompt=f"{hint}{row.values['question']}\n{listing(options)}\n{LETTER_SUFFIX}",
                images=(row.image(),) if has_image else (),
                category=row.values["subject"] or "",
                reference={"answer": answer, "options": options, "has_image": has_image, "in_split": True},
                options=len(options),
            )
        )
    return items


def _filled(path: Path, column: str) -> list[bool]:
    """Whether each row has something in `column`, reading few rows at a time."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        return [False] * file.metadata.num_rows
    batches = file.iter_batches(batch_size=64, columns=[column])
    return [valid for batch in batches for valid in batch.column(0).is_valid().to_pylist()]
