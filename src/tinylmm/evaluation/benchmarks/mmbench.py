"""MMBench: multiple-choice questions asked several times with their options rotated; only all right is right.

The rotations are rows of the file: row `base + r * 1,000,000` is rotation r. A runner answers every row once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import ConfigError, DataError, Fault
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import (
    LETTER_SUFFIX,
    LETTER_SUFFIX_CN,
    extract_lmms,
    guess,
    infer_opencompass,
    infer_vlmeval,
    listing,
)
from tinylmm.evaluation.benchmarks.files import read_parquet
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, pick_variant
from tinylmm.evaluation.benchmarks.spreadsheet import is_nan, read_tsv_images, whole_number, write_sheet

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "mmbench_dev_20230712.tsv and mmbench_dev_cn_20231003.tsv are at "
    "https://download.openmmlab.com/mmclassification/datasets/mmbench/, MMBench_DEV_EN_V11.tsv and the like at "
    "https://opencompass.openxlab.space/utils/benchmarks/MMBench/. In Hugging Face's layout: lmms-lab/MMBench."
)
FILES = {
    "dev": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
    "dev_cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
    "test": ("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv"),
    "test_cn": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
    "dev_v11": ("MMBench_DEV_EN_V11.tsv",),
    "dev_cn_v11": ("MMBench_DEV_CN_V11.tsv",),
    "test_v11": ("MMBench_TEST_EN_V11.tsv",),
    "test_cn_v11": ("MMBench_TEST_CN_V11.tsv",),
}
"""Names of each split's file, LLaVA's first. V1.1 asks other questions, so its figures are not comparable."""

ROTATION = 1_000_000
_V11 = "_v11"
_SUFFIXES = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}
_LETTERS = "ABCD"
_REQUIRED = ("index", "question", "A", "B")
_OPTIONAL = ("hint", "C", "D", "answer", "category", "source", "l2-category", "L2-category", "comment", "split")
_UPLOAD = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")

# The prompt that opencompass published for matching free answers to options, and VLMEvalKit and lmms-eval keep. VLMEvalKit
# has another for Chinese questions. Both put a question mark behind the question, whatever it ends in.
_MATCHING = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. "
    "You are provided with a question, several options, and an answer, and you need to find which option is most similar "
    "to the answer. If the meaning of all options are significantly different from the answer, output {none}. Your should "
    "output a single uppercase character in A, B, C, D (if they are valid options), and {none}. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: {none}\n"
    "Example 3: \nQuestion: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)
_MATCHING_CN = (
    "你是一个帮助我匹配答案与单选题中多个选项的 AI 助手。"
    "你会被提供：一个问题，多个选项，一个答案。你的任务是找到与答案意义最相近的选项。"
    "如果所有选项的意义都与答案显著不同，则输出 {none}。"
    "你应该输出一个单个的大写字母，例如 A, B, C, D（如果它们是有效选项），或 {none}。例 1:"
    "问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n答案: 一只可爱的泰迪熊\n输出: A\n"
    "例 2: \n问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n答案: 蜘蛛\n输出: {none}\n"
    "例 3: \n问题: {question}?\n选项: {options}\n答案: {answer}\n输出: "
)
_CHINESE = re.compile("[\u4e00-\u9fff]")


class MMBench(Benchmark):
    """MMBench, in English (`dev`) and Chinese (`dev_cn`), and its version 1.1 (`dev_v11`, `dev_cn_v11`).

    Published numbers come from the server (`write_submission`); scores here are by the same rules with exact matching, or with
    a judge for answers that the rules cannot read.

    Variants: `official` (VLMEvalKit's rules, circular), `lmms` (the rules of the first opencompass release, circular; an
    option that is absent counts as the text "nan", so "banana" names it; without a judge lmms-eval's own extractor reads what
    they cannot, as in its static task) and `vanilla` (official rules, first rotation only).
    Without a judge an unread answer is wrong. With one, a group is wrong without asking where any read answer is; else each
    unread answer is asked about up to three times, then a letter is guessed from the item's id (`guessed`).
    Aggregate: `accuracy` over base questions, then `category/...` and `l2/...`; percent. Per item: whether that row is right.
    """

    name = "mmbench"
    variants = ("official", "lmms", "vanilla")
    headline = "accuracy"
    max_new_tokens = 1024
    may_be_judged = True
    upload = "xlsx"
    splits = tuple(FILES)
    rules: ClassVar[Mapping[str, int]] = {"official": 2, "lmms": 2, "vanilla": 2}

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read the TSV under `mmbench/` (or `root` itself, if it is a .tsv file), or the parquet of lmms-lab/MMBench.

        Without a chosen split the first that is there. The test splits have no answers: they can only be uploaded.
        """
        files, found = _files(root), self.chosen_split(root, layout)
        if layout == "hf":
            if found.endswith(_V11):
                raise ConfigError([Fault("split", f"{found} is read from its TSV, {FILES[found][0]}, only.", GET)])
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
        items = [_item(values, f"{path}, row {n}", image, suffix) for n, (values, image) in enumerate(table, 1)]
        repeated = [name for name, times in Counter(item.item_id for item in items).items() if times > 1]
        if repeated:
            raise DataError(f"{path}: {len(repeated)} indices occur twice, {repeated[0]} first. Fetch the file again.")
        return items

    def chosen_split(self, root: Path, layout: Format = "llava") -> str:
        """As `Benchmark.chosen_split`."""
        files, wanted = _files(root), (self.split,) if self.split else self.splits
        if layout == "hf":
            found = (s for s in wanted if not s.endswith(_V11) and files.has_parquet(_phase(s), _language(s)))
            return next(found, wanted[0])  # the parquet files are of V1.0
        if _is_table(root):
            return self.split or _split_of(root)
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
            letters[item.item_id] = _read(item, answer.text, variant, judge) if answer else None
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
        """By index. Of LLaVA's `--all-rounds` files round 0 counts: further rounds rotate what the file has rotated.

        Raises:
            DataError: as `Benchmark.pair`, or a row names another question than the item has: V1.0 and V1.1 share indices.
        """
        asked = {item.item_id: item.reference["question"] for item in items}
        for row in rows:
            question = row.get("question")
            known = asked.get(str(row["question_id"]))
            if question is not None and known is not None and str(question).split() != known.split():
                raise DataError(
                    f"index {row['question_id']} is about {question!r} in the answer file and about {known!r} in the question "
                    "file. Are they of two versions of MMBench? Score the answers against the file they were made from."
                )
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


def _split_of(table: Path) -> str:
    """The split that a TSV's name tells; the English dev split where it tells none."""
    known = next((split for split, names in FILES.items() if table.name in names), None)
    words = table.stem.lower().split("_")
    parts = ("test" if "test" in words else "dev", *(part for part in ("cn", "v11") if part in words))
    return known or "_".join(parts)


def _index(values: Mapping[str, Any], where: str) -> int:
    number = whole_number(values["index"])
    if number is None:
        raise DataError(f"{where}: index {values['index']!r} is no number. Fetch the file again.")
    return number


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
    return "cn" if "_cn" in split else "en"


def _phase(split: str) -> str:
    return split.split("_")[0]


def _infer(item: Item, text: str, variant: str) -> str | None:
    options = item.reference["options"]
    return infer_opencompass(text, _with_absent(options)) if variant == "lmms" else infer_vlmeval(text, options)


def _read(item: Item, text: str, variant: str, judge: Judge | None) -> str | None:
    """An answer by the variant's rules; without a judge lmms-eval has a second extractor (its task `mmbench_en_dev_static`)."""
    letter = _infer(item, text, variant)
    if letter is None and variant == "lmms" and judge is None:
        return extract_lmms(text, _LETTERS)
    return letter


def _with_absent(options: Mapping[str, str]) -> dict[str, str]:
    """lmms-eval takes an absent option for one whose text is "nan"."""
    return {letter: options.get(letter, "nan") for letter in _LETTERS}


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
    question, lmms = item.reference["question"], variant == "lmms"
    asked = _MATCHING_CN if not lmms and _CHINESE.search(question) else _MATCHING
    prompt = asked.format(
        none="E" if lmms else "Z",
        question=question,
        options="There are several options: \n"
        + "".join(f"{letter}. {t}\n" for letter, t in item.reference["options"].items()),
        answer=text,
    )
    for attempt in range(3):
        letter = _infer(item, judge.ask([{"role": "user", "content": prompt}], max_tokens=256, sample=attempt), variant)
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
