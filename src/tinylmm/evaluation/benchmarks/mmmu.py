"""MMMU, validation: college-level questions from thirty subjects, 847 with choices and 53 open."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import (
    LETTER_SUFFIX,
    WORD_SUFFIX,
    guess,
    lettered,
    listing,
    parse_listed,
)
from tinylmm.evaluation.benchmarks.files import ParquetRow, image_file, read_list, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, count_items, graded, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "anns_for_eval.json and all_images/ come with TinyLLaVA Factory's MMMU.zip, answer_dict_val.json is in eval/ of "
    "https://github.com/MMMU-Benchmark/MMMU. In Hugging Face's layout: MMMU/MMMU or lmms-lab/MMMU."
)

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""The six domains and thirty subjects of the official scorer, spelt as it spells them."""

SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
"""The order in which the official scorer goes through the subjects (alphabetical); its guesses depend on it."""

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Numbers with thousands separators, in scientific notation, and plain."""


def normalise(text: str) -> list[str | float]:
    """A number as a float of two decimals; else lower case, and a single character with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parse_open(text: str) -> list[str | float]:
    """What an open answer may mean, as the official `parse_open_response` reads it: texts, then numbers, sorted.

    Per line the shortest tail after a word such as "is " or "answer "; "=" counts from the last line on. Without any such
    tail, the whole answer. Then every number in them. A full stop in front is lost (".5" is 5).
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []
    for number, line in enumerate(lines, 1):
        marks = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        shortest = ""
        for mark in marks:
            if mark in line:
                tail = line.split(mark)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    tails = tails or [text]
    numbers = [number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail)]
    meanings = {meaning for found in (*tails, *numbers) for meaning in normalise(found)}
    texts = sorted(meaning for meaning in meanings if isinstance(meaning, str))
    return [*texts, *sorted(meaning for meaning in meanings if isinstance(meaning, float))]


def open_is_right(meanings: Sequence[str | float], gold: Sequence[str]) -> bool:
    """A text is right where it CONTAINS a gold text ("i do not know" contains "no"), a number where it equals one."""
    wanted = [meaning for text in gold for meaning in normalise(text)]
    for meaning in meanings:
        if isinstance(meaning, str):
            if any(isinstance(text, str) and text in meaning for text in wanted):
                return True
        elif meaning in wanted:
            return True
    return False


class MMMU(Benchmark):
    """MMMU validation, 900 questions.

    Variants: `tinyllava` (TinyLLaVA's script: the official parser; its unseeded guess is drawn from the item's id here),
    `official` (guesses as the official scorer draws them, `random.seed(42)` through the subjects in order; questions without
    an answer leave the denominator), `lmms` (lmms-eval: `X ` and `X.` count anywhere) and `lmms_before_1471` (lmms-eval before
    its pull request 1471, which scored every open question 0).
    Aggregate: `overall`, six `domain/...` and the subjects; micro averages in percent, one decimal. A guessed answer has
    `parsed` None and is counted as `unparsed` and `guessed`.
    """

    name = "mmmu"
    variants = ("tinyllava", "official", "lmms", "lmms_before_1471")
    headline = "overall"
    max_new_tokens = 1024
    upload = "json"

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `MMMU/anns_for_eval.json` with `answer_dict_val.json`, or the validation parquet (per subject, or merged).

        Only the first image is shown, as by the official and TinyLLaVA's scripts; the `<image n>` marks stay in the text.
        In TinyLLaVA's file, questions with several images have none: the script guesses them instead of asking.
        """
        files = BenchmarkFiles.under(root, GET, "MMMU", "mmmu")
        return _load_hf(files) if layout == "hf" else _load_tinyllava(files)

    def truth(self, item: Item) -> str:
        """As `Benchmark.truth`."""
        return " / ".join(dict.fromkeys(item.reference["gold"]))

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score letters and open answers; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        scored: dict[str, ItemScore] = {}
        guessed = 0
        drawn = random.Random(42)
        # the official guesses come one after the other, so they depend on the order of the subjects
        for item in sorted(items, key=lambda item: SUBJECTS.index(item.category) if item.category in SUBJECTS else -1):
            answer = answers.get(item.item_id)
            if answer is None:
                scored[item.item_id] = ItemScore(item.item_id, None if variant == "official" else 0.0)
            elif item.options:
                letter = parse_listed(answer.text, item.reference["options"], loose=variant.startswith("lmms"))
                chosen = letter
                if letter is None:
                    guessed += 1
                    letters = list(item.reference["options"])
                    chosen = drawn.choice(letters) if variant == "official" else guess(item.item_id, letters)
                scored[item.item_id] = ItemScore(item.item_id, float(chosen in item.reference["gold"]), letter)
            else:
                meanings = parse_open(answer.text)
                right = open_is_right(meanings, item.reference["gold"]) and variant != "lmms_before_1471"
                scored[item.item_id] = ItemScore(item.item_id, float(right), _printable(meanings))
        rows = [scored[item.item_id] for item in items]
        counts = count_items(items, answers, rows, guessed=guessed)
        metrics = _metrics(graded(items, rows))
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write what the official main_eval_only.py and EvalAI take: JSON of id -> letter (choices, parsed) or text (open)."""
        import json

        texts = {}
        for item in items:
            if item.item_id in answers:
                text = answers[item.item_id].text
                options = item.reference["options"]
                texts[item.item_id] = (
                    parse_listed(text, options) or guess(item.item_id, list(options)) if options else text
                )
        path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _printable(meanings: Sequence[str | float]) -> list[str | float]:
    """ "nan" and "infinity" are numbers to the parser, but not to JSON."""
    return [m if isinstance(m, str) or math.isfinite(m) else str(m) for m in meanings]


def _metrics(rows: Graded) -> Metrics:
    metrics = Metrics(digits=1)
    metrics.mean("overall", rows)
    for domain, subjects in DOMAINS.items():
        within = [(item, score) for item, score in rows if item.category in subjects]
        if within:
            metrics.mean(f"domain/{domain}", within)
    metrics.means_by("subject", rows, lambda item: item.category)
    return metrics


def subject_of(item_id: str) -> str:
    """`validation_Art_Theory_3` -> `Art_Theory`."""
    return "_".join(item_id.split("_")[1:-1])


def _load_tinyllava(files: BenchmarkFiles) -> list[Item]:
    path = files.file("anns_for_eval.json")
    gold_path = files.file("answer_dict_val.json", "eval/answer_dict_val.json")
    folder = files.image_folder("all_images")
    gold = read_object(gold_path)
    items = []
    for number, record in enumerate(read_list(path), 1):
        where = f"{path}, record {number}"
        require(record, ("id", "prompt", "question_type"), where)
        truth = gold.get(record["id"])
        if truth is None:
            raise DataError(f"{where}: {gold_path} has no answer for {record['id']}. Are both of the same split?")
        require(truth, ("question_type", "ground_truth"), f"{gold_path}, {record['id']}")
        choices = truth["question_type"] == "multiple-choice"
        if choices:
            require(record, ("index2ans",), where)
            require(record["index2ans"], (), f"{where}, index2ans")
        images: tuple[ImageRef, ...] = ()
        if record.get("image"):
            images = (image_file(folder, record["image"], where),)
        items.append(
            _item(
                record["id"],
                str(record["prompt"]).replace("<image>", "").strip(),
                images,
                record["index2ans"] if choices else {},
                truth["ground_truth"],
            )
        )
    return items


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    items = []
    for row in _hf_rows(files):
        values = row.values
        options: dict[str, str] = {}
        if values["question_type"] == "multiple-choice":
            options = lettered(_literal(values["options"], row.where))
            prompt = f"{values['question']}\n{listing(options, '({}) {}')}\n\n{LETTER_SUFFIX}"
        else:
            prompt = f"{values['question']}\n{WORD_SUFFIX}"
        gold = values["answer"]
        if not options and gold.startswith("["):
            gold = _literal(gold, row.where)
        items.append(_item(values["id"], prompt, (row.image("image_1"),), options, gold))
    return items


def _hf_rows(files: BenchmarkFiles) -> list[ParquetRow]:
    """The merged split, or the subjects' folders one after the other."""
    shards = []
    for subject in SUBJECTS:
        folder = files.find(subject)
        if folder is not None:
            shards += sorted(folder.glob("validation-*.parquet")) or sorted(folder.glob("validation.parquet"))
    return read_parquet(shards or files.parquet("validation"), ("id", "question", "options", "answer", "question_type"))


def _literal(text: Any, where: str) -> list[str]:
    """The data set spells lists as strings of Python lists."""
    try:
        values = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"{where}: {text!r} is no list. Fetch the file again.") from error
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: {text!r} is no list. Fetch the file again.")
    return [str(value) for value in values]


def _item(
    item_id: str, prompt: str, images: tuple[ImageRef, ...], options: Mapping[str, Any], gold: str | list[str]
) -> Item:
    answers = [str(text) for text in gold] if isinstance(gold, list) else [str(gold)]
    return Item(
        item_id=item_id,
        question_id=item_id,
        prompt=prompt,
        images=images,
        category=subject_of(item_id),
        reference={"options": {letter: str(text) for letter, text in options.items()}, "gold": answers},
        options=len(options),
    )
