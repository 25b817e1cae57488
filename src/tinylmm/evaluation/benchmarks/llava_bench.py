"""LLaVA-Bench in the Wild: 60 open questions about 24 images, rated by a judge model against GPT-4's answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl, read_parquet
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/ are in "
    "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild. In Hugging Face's layout: "
    "lmms-lab/llava-bench-in-the-wild."
)
CATEGORIES = ("complex", "conv", "detail")
FAILED = (-1.0, -1.0)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

# The judge's rule is part of the benchmark, the same for all three categories (llava/eval/table/rule.json of
# haotian-liu/LLaVA, Apache-2.0); the space before a line break is its own.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the image "
    "is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, respectively. "
    "The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and "
    "ensuring that the order in which the responses were presented does not affect your judgment."
)


def parse_llava(review: str) -> tuple[float, float]:
    """LLaVA's `eval_gpt_review_bench.py`: the first line, commas as spaces, split on ONE space, exactly two numbers.

    Anything else, "9, 7" and "8  6" among it, is (-1, -1), which stays in the mean.
    """
    words = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first) and math.isfinite(second) else FAILED


def parse_lmms(review: str) -> tuple[float, float]:
    """lmms-eval: the first two numbers of the first line of the stripped review, whatever stands between them.

    A minus sign belongs to its number, so "9-7" is (9, -7), as there.
    """
    found = _NUMBER.findall(review.strip().split("\n")[0])
    return (float(found[0]), float(found[1])) if len(found) >= 2 else FAILED


_PARSERS: dict[str, Callable[[str], tuple[float, float]]] = {"llava": parse_llava, "lmms": parse_lmms}
_HEAT = {"llava": 0.2, "lmms": 0.0}
"""The judge's temperature."""


class LLaVABench(Benchmark):
    """LLaVA-Bench in the Wild.

    Variants: `llava` (published with gpt-4-0314) and `lmms` (no system message, temperature 0, and a lenient reading of the
    judge's two numbers).
    Aggregate: `all` and each category relative to GPT-4's answers (percent, one decimal: means are rounded to three decimals
    first), then `reference/...` and `model/...`, the mean ratings behind them. Per item: the rating of the model's answer, 1 to
    10 (-1 where the review could not be read; counted as `unread_reviews`), and [reference, model] as `parsed`. A missing
    answer is judged as an empty one. Without a judge nothing has a score, and counts.unjudged says of how many.
    """

    name = "llava_bench"
    variants = ("llava", "lmms")
    rules: ClassVar[Mapping[str, int]] = {"lmms": 2}
    headline = "all"
    max_new_tokens = 1024
    judged = True
    top = 10.0

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `llava-bench-in-the-wild/` (questions, context by image, GPT-4's answers by question id), or the parquet."""
        files = BenchmarkFiles.under(root, GET, "llava-bench-in-the-wild", "llava_bench")
        return _load_hf(files) if layout == "hf" else _load_llava(files)

    def regraded(self, items: Sequence[Item], rows: Sequence[ItemScore]) -> Mapping[str, float]:
        """As `Benchmark.regraded`: from the ratings that the judge gave."""
        return _metrics(items, [_ratings(row) for row in rows]).aggregate

    def truth(self, item: Item) -> str:
        """As `Benchmark.truth`."""
        return ""  # the judge compares with GPT-4's answer; nobody says what is right

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Let the judge rate every answer beside GPT-4's; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        if judge is None:
            rows = tuple(ItemScore(item.item_id, None) for item in items)
            counts = count_items(items, answers, rows) | {"unparsed": 0}
            return Scores(self.name, variant, {}, rows, counts | {"unjudged": len(items) - counts["missing"]})
        before = judge.usage.copy()

        def rate(item: Item) -> tuple[float, float]:
            answer = answers.get(item.item_id)
            content = _content(item, answer.text if answer else "")
            return _PARSERS[variant](
                judge.ask(_messages(variant, content), max_tokens=1024, temperature=_HEAT[variant])
            )

        ratings = judge.map(rate, items)
        rows = tuple(
            ItemScore(item.item_id, model, None if (first, model) == FAILED else [first, model])
            for item, (first, model) in zip(items, ratings, strict=True)
        )
        unread = ratings.count(FAILED)
        counts = count_items(items, answers, rows, unread_reviews=unread, unjudged=0) | judge.usage.counts(before)
        metrics = _metrics(items, ratings)
        return Scores(self.name, variant, metrics.aggregate, rows, counts, metrics.bases)


def _ratings(row: ItemScore) -> tuple[float, float]:
    return FAILED if row.parsed is None else (float(row.parsed[0]), float(row.parsed[1]))


def _messages(variant: str, content: str) -> list[dict[str, str]]:
    """LLaVA's judge is told what it is; lmms-eval's is asked only."""
    system = [{"role": "system", "content": SYSTEM}] if variant == "llava" else []
    return [*system, {"role": "user", "content": content}]


def _content(item: Item, text: str) -> str:
    reference = item.reference
    return (
        f"[Context]\n{reference['caption']}\n\n[Question]\n{reference['question']}\n\n"
        f"[Assistant 1]\n{reference['gpt4']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )


def _metrics(items: Sequence[Item], ratings: Sequence[tuple[float, float]]) -> Metrics:
    """Ratings relative to the reference's, in percent without an end, then the mean ratings of both."""
    relative, means = Metrics(), Metrics()
    for name in ("all", *CATEGORIES):
        rows = [(item, pair) for item, pair in zip(items, ratings, strict=True) if name in ("all", item.category)]
        if rows:
            about = [item for item, _ in rows]
            first, model = (round(sum(column) / len(column), 3) for column in zip(*(p for _, p in rows), strict=True))
            means.other(f"reference/{name}", first, about, top=LLaVABench.top)
            means.other(f"model/{name}", model, about, top=LLaVABench.top)
            if first:
                relative.other(name, round(model / first * 100, 1), about, top=None)
    relative.aggregate |= means.aggregate
    relative.bases |= means.bases
    return relative


def _load_llava(files: BenchmarkFiles) -> list[Item]:
    path = files.file("questions.jsonl")
    context_path, gpt4_path = files.file("context.jsonl"), files.file("answers_gpt4.jsonl")
    captions = {row["image"]: _caption(row["caption"]) for row in read_jsonl(context_path, ("image", "caption"))}
    gpt4 = {str(row["question_id"]): row["text"] for row in read_jsonl(gpt4_path, ("question_id", "text"))}
    folder = files.image_folder("images")
    items = []
    for number, record in enumerate(read_jsonl(path, ("question_id", "image", "category", "text")), 1):
        where = f"{path}, question {number}"
        if record["image"] not in captions:
            raise DataError(f"{where}: {context_path} has no caption of {record['image']}. Fetch the files again.")
        if str(record["question_id"]) not in gpt4:
            raise DataError(f"{where}: {gpt4_path} has no answer to question {record['question_id']}.")
        if record["category"] not in CATEGORIES:
            raise DataError(f"{where}: category {record['category']!r} is none of {', '.join(CATEGORIES)}.")
        reference = {
            "caption": captions[record["image"]],
            "question": record["text"],
            "gpt4": gpt4[str(record["question_id"])],
        }
        items.append(
            Item(
                item_id=str(record["question_id"]),
                question_id=record["question_id"],
                prompt=record["text"],
                images=(image_file(folder, record["image"], where),),
                category=record["category"],
                reference=reference,
            )
        )
    return items


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    fields = ("question_id", "question", "category", "caption", "gpt_answer")
    items = []
    for row in read_parquet(files.parquet("train"), fields):
        values = row.values
        reference = {
            "caption": _caption(values["caption"]),
            "question": values["question"],
            "gpt4": values["gpt_answer"],
        }
        items.append(
            Item(
                item_id=str(values["question_id"]),
                question_id=values["question_id"],
                prompt=values["question"],
                images=(row.image(),),
                category=values["category"],
                reference=reference,
            )
        )
    return items


def _caption(caption: Any) -> str:
    """Captions come as a list of lines or as one text."""
    return "\n".join(str(line) for line in caption) if isinstance(caption, list) else str(caption)
