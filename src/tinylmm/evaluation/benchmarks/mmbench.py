"""MMBench: multiple-choice questions asked several times with their options rotated; only all right is right.

The rotations are rows of the file: row `base + r * 1,000,000` is rotation r. A runner answers every row once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import (
    LETTER_SUFFIX,
    LETTER_SUFFIX_CN,
    guess,
    infer_opencompass,
    infer_vlmeval,
    listing,
)
from tinylmm.evaluation.benchmarks.files import read_parquet
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, pick_variant
from tinylmm.evaluation.benchmarks.spreadsheet import is_nan, read_tsv_images, write_sheet

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "mmbench_dev_20230712.tsv and mmbench_dev_cn_20231003.tsv are at "
    "https://download.openmmlab.com/mmclassification/datasets/mmbench/. In Hugging Face's layout: lmms-lab/MMBench."
)
FILES = {
    "dev": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
    "dev_cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
    "test": ("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv"),
    "test_cn": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
}
"""Names of each split's file, LLaVA's first."""

ROTATION = 1_000_000
_SUFFIXES = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}
_LETTERS = "ABCD"
_REQUIRED = ("index", "question", "A", "B")
_OPTIONAL = ("hint", "C", "D", "answer", "category", "source", "l2-category", "L2-category", "comment", "split")
_UPLOAD = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")

# The prompt that opencompass published for matching free answers to options, and VLMEvalKit and lmms-eval keep.
_MATCHING = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. "
    "You are provided with a question, several options, and an answer, and you need to find which option is most similar "
    "to the answer. If the meaning of all options are significantly different from the answer, output {none}. Your should "
    "output a single uppercase character in A, B, C, D (if they are valid options), and {none}. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: {none}\n"
    "Example 3: \nQuestion: {question}\nOptions: {options}\nAnswer: {answer}\nYour output: "
)


class MMBench(Benchmark):
    """MMBench, in English (`dev`) and Chinese (`dev_cn`).

    Published numbers come from the server (`write_submission`); scores here are by the same rules with exact matching, or with
    a judge for answers that the rules cannot read.

    Variants: `official` (VLMEvalKit's rules, circular), `lmms` (the rules of the first opencompass release, circular; an
    option that is absent counts as the text "nan", so "banana" names it) and `vanilla` (official rules, first rotation only).
    Without a judge an unread answer is wrong. With one, a group is wrong without asking where any read answer is; else each
    unread answer is asked about up to three times, then a letter is guessed from the item's id (`guessed`).
    Aggregate: `accuracy` over base questions, then `category/...` and `l2/...`; percent. Per item: whether that row is right.
    """

    name = "mmbench"
    variants = ("official", "lmms", "vanilla")
    headline = "accuracy"
    max_new_tokens = 1024
    upload = "xlsx"
    splits = ("dev", "dev_cn", "test", "test_cn")

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read the TSV under `mmbench/` (or `root` itself, if it is a .tsv file), or the parquet of lmms-lab/MMBench.

        Without a chosen split the first that is there. The test splits have no answers: they can only be uploaded.
        """
        files, found = _files(root), self.chosen_split(root, layout)
        if layout == "hf":
            suffix = _SUFFIXES[_language(found)]
            rows = read_parquet(files.parquet(_phase(found), _language(found)), _REQUIRED, _OPTIONAL)
            images: dict[int, ImageRef] = {}  # a question's rotations repeat its image
            items = []
            for row in rows:
                image = images.setdefault(_index(row.values, row.where) % ROTATION, row.image())
                items.append(_item(row.values, row.where, image, suffix))
            return items
        path = root if _is_table(root) else files.file(*FILES[found])
        table = read_tsv_images(path, (*_REQUIRED, "image"), _OPTIONAL)
        suffix = _SUFFIXES[_language(found)]
        return [_item(values, f"{path}, row {n}", image, suffix) for n, (values, image) in enumerate(table, 1)]

    def chosen_split(self, root: Path, layout: Format = "llava") -> str:
        """As `Benchmark.chosen_split`."""
        files, wanted = _files(root), (self.split,) if self.split else self.splits
        if layout == "hf":
            return next((s for s in wanted if files.has_parquet(_phase(s), _language(s))), wanted[0])
        if _is_table(root):
            return self.split or ("dev_cn" if "cn" in root.stem.lower().split("_") else "dev")
        return next((s for s in wanted if files.find(*FILES[s])), wanted[0])

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score rows and groups; see the class for variants and metrics. Items without a gold answer (test) get no score."""
        variant = pick_variant(self, variant)
        letters: dict[str, str | None] = {}
        for item in items:
            answer = answers.get(item.item_id)
            letters[item.item_id] = _infer(item, answer.text, variant) if answer else None
        groups: dict[int, list[Item]] = defaultdict(list)
        for item in items:
            if item.reference["answer"] and (variant != "vanilla" or item.reference["index"] < ROTATION):
                groups[item.reference["base"]].append(item)
        more = {"questions": len(groups), "judged": 0, "guessed": 0}
        chosen = dict(letters)
        if judge is not None:
            before = judge.usage.copy()
            for matches in judge.map(
                lambda group: _ask(group, answers, variant, judge, letters), list(groups.values())
            ):
                for item, letter in matches:
                    letters[item.item_id] = chosen[item.item_id] = letter
                    if letter is None:
                        chosen[item.item_id] = _guess(item, variant)
                    more["judged"] += 1
                    more["guessed"] += letter is None
            more |= judge.usage.counts(before)
        hits = {
            base: float(all(chosen[item.item_id] == item.reference["answer"] for item in group))
            for base, group in groups.items()
        }
        counted = {item.item_id for group in groups.values() for item in group}
        rows = tuple(
            ItemScore(
                item.item_id,
                float(chosen[item.item_id] == item.reference["answer"]) if item.item_id in counted else None,
                letters[item.item_id],
            )
            for item in items
        )
        metrics = _metrics(groups, hits)
        counts = count_items(items, answers, rows, **more)
        return Scores(self.name, variant, metrics.aggregate, rows, counts, metrics.bases)

    def group_of(self, item: Item) -> str:
        """As `Benchmark.group_of`: a question's rotations are right together or not."""
        return str(item.reference["base"])

    def pair(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """By index. Of LLaVA's `--all-rounds` files round 0 counts: further rounds rotate what the file has rotated."""
        return super().pair(items, [row for row in rows if not row.get("round_id")])

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write the server's xlsx: the file's columns without hint, category, source, image, comment and l2-category, with the
        prediction before the answer. Rows without a prediction keep an empty cell.
        """
        table = []
        for item in items:
            answer = answers.get(item.item_id)
            values = {**item.reference["row"], "prediction": answer.text if answer else None}
            table.append([values.get(name) for name in _UPLOAD])
        present = [
            number for number, name in enumerate(_UPLOAD) if name != "answer" or any(row[number] for row in table)
        ]  # the test split has no answers, so its upload has no such column
        write_sheet(path, [_UPLOAD[number] for number in present], [[row[n] for n in present] for row in table])


def _files(root: Path) -> BenchmarkFiles:
    return BenchmarkFiles.under(root, GET, "mmbench", "mmbench_cn", "MMBench")


def _is_table(root: Path) -> bool:
    return root.suffix == ".tsv" and root.is_file()


def _index(values: Mapping[str, Any], where: str) -> int:
    try:
        return int(values["index"])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: index {values['index']!r} is no number. Fetch the file again.") from error


def _item(values: Mapping[str, Any], where: str, image: ImageRef, suffix: str) -> Item:
    index = _index(values, where)
    options: dict[str, str] = {}
    for letter in _LETTERS:
        if is_nan(values.get(letter)):
            break
        options[letter] = str(values[letter])
    hint = "" if is_nan(values.get("hint")) else f"{values['hint']}\n"
    question = str(values["question"])
    gold = "" if is_nan(values.get("answer")) else str(values["answer"])
    if gold and gold not in options:
        raise DataError(f"{where}: answer {gold!r} is no option ({', '.join(options)}). Fetch the file again.")
    row = {name: None if is_nan(values.get(name)) else values[name] for name in _UPLOAD if name != "prediction"}
    l2 = values.get("l2-category") or values.get("L2-category")
    return Item(
        item_id=str(index),
        question_id=index,
        prompt=f"{hint}{question}\n{listing(options)}\n{suffix}",
        images=(image,),
        category="" if is_nan(values.get("category")) else str(values["category"]),
        reference={
            "index": index,
            "base": index % ROTATION,
            "question": question,
            "options": options,
            "answer": gold,
            "l2": "" if is_nan(l2) else str(l2),
            "row": {**row, "index": index},
        },
        options=len(options),
    )


def _language(split: str) -> str:
    return "cn" if split.endswith("_cn") else "en"


def _phase(split: str) -> str:
    return split.removesuffix("_cn")


def _infer(item: Item, text: str, variant: str) -> str | None:
    options = item.reference["options"]
    if variant == "lmms":
        return infer_opencompass(text, {letter: options.get(letter, "nan") for letter in _LETTERS})
    return infer_vlmeval(text, options)


def _ask(
    group: Sequence[Item],
    answers: Mapping[str, Answer],
    variant: str,
    judge: Judge,
    letters: Mapping[str, str | None],
) -> list[tuple[Item, str | None]]:
    """What the judge matches those rows to that the rules could not read, until a row of the group is wrong."""
    read = [(item, letters[item.item_id]) for item in group]
    lost = any(letter and letter != item.reference["answer"] for item, letter in read)
    matches: list[tuple[Item, str | None]] = []
    if lost or any(item.item_id not in answers for item in group):
        return matches
    for item, letter in read:
        if letter is None:
            matched = _match(item, answers[item.item_id].text, variant, judge)
            matches.append((item, matched))
            if (matched or _guess(item, variant)) != item.reference["answer"]:
                break
    return matches


def _guess(item: Item, variant: str) -> str:
    """Among the options and the letter for none of them."""
    return guess(item.item_id, [*item.reference["options"], "E" if variant == "lmms" else "Z"])


def _match(item: Item, text: str, variant: str, judge: Judge) -> str | None:
    """What the judge matches an answer to: an option's letter, the letter for none, or None after three useless replies."""
    options = item.reference["options"]
    none = "E" if variant == "lmms" else "Z"
    prompt = _MATCHING.format(
        none=none,
        question=item.reference["question"] + ("?" if variant == "lmms" else ""),
        options="There are several options: \n" + "".join(f"{letter}. {t}\n" for letter, t in options.items()),
        answer=text,
    )
    for attempt in range(3):
        reply = judge.ask([{"role": "user", "content": prompt}], max_tokens=256, sample=attempt)
        letter = _infer(item, reply, variant) or (none if reply.strip(" .\n") == none else None)
        if letter is not None:
            return letter
    return None


def _metrics(groups: Mapping[int, Sequence[Item]], hits: Mapping[int, float]) -> Metrics:
    metrics = Metrics()
    rows = [(group[0], hits[base]) for base, group in groups.items()]
    if rows:
        rotated = any(len(group) > 1 for group in groups.values())
        metrics.mean("accuracy", rows, rotated)
        metrics.means_by("category", rows, lambda item: item.category, rotated)
        metrics.means_by("l2", rows, lambda item: str(item.reference["l2"]), rotated)
    return metrics
