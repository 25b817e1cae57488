"""MM-Vet: 218 open questions, graded from 0 to 1 by a judge model against reference answers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl, read_object, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import pair_by_key
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, count_items, graded, percent, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "mm-vet.json and images/ are in https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip, "
    "llava-mm-vet.jsonl in LLaVA's eval.zip. In Hugging Face's layout: lmms-lab/MMVet."
)
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

# The grader's prompt is part of the benchmark: a score is comparable only where it is exactly this
# (mm-vet_evaluator.py of yuweihao/MM-Vet, Apache-2.0).
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland "
    "are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered "
    "in ice and snow. The meme is saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the "
    "ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and "
    "<OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness "
    "score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the "
    "last space of the correctness score.\n"
    "{header} | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n" + _MEME + "The meme talks about Iceland and "
    "Greenland. It's pointing out that despite their names, Iceland is not very icy and Greenland isn't very green. | 0.4\n"
    + _MEME
    + "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its "
    "name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust "
    "issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme "
    "is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. "
    "| 1.0\n"
)
_ASKED_AGAIN = "\nPredict the correctness of the answer (digit): "
_RE_ASKS = 5


def parse_grade(reply: str) -> float | None:
    """The first space-separated word as a number in [0, 1]; None for anything else."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


class MMVet(Benchmark):
    """MM-Vet.

    Variants: `official` (the benchmark's notebook, which LLaVA and TinyLLaVA use; published with gpt-4-0613) and `lmms`
    (lmms-eval: another header, 128 tokens, other re-asking; its models are also asked with a step-by-step pre-prompt).
    Aggregate: `total`, the six capabilities, `set/...` per exact set of capabilities (percent, one decimal), and `std` over
    the judge's runs, if there are several. A grade nobody could read after all re-asks is 0 and counted as `ungraded`.
    Without a judge nothing has a score, and counts.unjudged says of how many.
    """

    name = "mmvet"
    variants = ("official", "lmms")
    headline = "total"
    max_new_tokens = 1024
    upload = "json"
    judged = True
    averages_runs = True

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `mm-vet/llava-mm-vet.jsonl` with mm-vet.json (alone, it says what to ask too), or lmms-lab/MMVet."""
        files = BenchmarkFiles.under(root, GET, "mm-vet", "mmvet")
        return _load_hf(files) if layout == "hf" else _load_llava(files)

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Let the judge grade every answer, `judge.runs` times; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        grade = _grade_lmms if variant == "lmms" else _grade_official
        if judge is None:
            rows = [ItemScore(item.item_id, None if item.item_id in answers else 0.0) for item in items]
            counts = count_items(items, answers, rows)
            left = len(items) - counts["missing"]
            return Scores(self.name, variant, {}, tuple(rows), counts | {"unjudged": left})
        before = judge.usage.copy()

        def grades_of(item: Item) -> list[float | None]:
            answer = answers.get(item.item_id)
            return [grade(item, answer.text, judge, run) if answer else 0.0 for run in range(judge.runs)]

        judged = judge.map(grades_of, items)
        runs = [[value or 0.0 for value in grades] for grades in judged]
        rows = [
            ItemScore(
                item.item_id,
                statistics.fmean(values),
                None if None in grades or item.item_id not in answers else values,
            )
            for item, grades, values in zip(items, judged, runs, strict=True)
        ]
        ungraded = sum(grades.count(None) for grades in judged)
        counts = count_items(items, answers, rows, ungraded=ungraded, unjudged=0) | judge.usage.counts(before)
        metrics = _metrics(graded(items, rows), runs)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)

    def pair(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """By question id: 12 and "v1_12" are the same."""
        return pair_by_key(items, rows, lambda item: _bare(item.question_id), lambda row: _bare(row["question_id"]))

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write what the grader's page takes (LLaVA's convert_mmvet_for_eval.py): JSON of v1_<id> -> text, every question."""
        texts = {}
        for item in items:
            answer = answers.get(item.item_id)
            texts[f"v1_{_bare(item.question_id)}"] = answer.text if answer else ""
        path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bare(question_id: object) -> str:
    return str(question_id).removeprefix("v1_")


def _question(item: Item, text: str) -> str:
    gold = item.reference["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return " | ".join([item.reference["question"], gold, text, ""])


def _grade_official(item: Item, text: str, judge: Judge, run: int) -> float | None:
    """Ask; then up to five times with an extra line, hotter by 0.5 each time after the first. The fifth reply is not read."""
    prompt = PROMPT.format(header="\nQuestion") + "\n" + _question(item, text)
    grade = parse_grade(judge.ask([{"role": "user", "content": prompt}], max_tokens=3, sample=run))
    for again in range(_RE_ASKS):
        if grade is not None:
            break
        message = {"role": "user", "content": prompt + _ASKED_AGAIN}
        reply = judge.ask([message], max_tokens=3, temperature=0.5 * again, sample=run)
        grade = parse_grade(reply) if again + 1 < _RE_ASKS else None
    return grade


def _grade_lmms(item: Item, text: str, judge: Judge, run: int) -> float | None:
    """The same question up to temperature 1.5, with more room for the reply."""
    prompt = PROMPT.format(header="gpt_query_prompt") + "\n" + _question(item, text).rstrip(" ")
    for again in range(4):
        reply = judge.ask(
            [{"role": "user", "content": prompt}], max_tokens=128, temperature=0.5 * again, sample=run
        ).strip()
        grade = parse_grade(reply)
        if grade is not None or not reply:
            return grade
    return None


def _metrics(rows: Graded, runs: Sequence[Sequence[float]]) -> Metrics:
    metrics = Metrics(digits=1)
    metrics.mean("total", rows)
    for capability in CAPABILITIES:
        within = [(item, score) for item, score in rows if capability in item.reference["capabilities"]]
        if within:
            metrics.mean(capability, within)
    metrics.means_by("set", rows, _set_of)
    totals = [percent(column, None) for column in zip(*runs, strict=True)]
    if len(totals) > 1:  # one run says nothing of how far runs differ
        metrics.other("std", round(statistics.pstdev(totals), 1), (item for item, _ in rows), top=None)
    return metrics


def _set_of(item: Item) -> str:
    """The exact set of capabilities that a question needs, in the official order."""
    order = {name: number for number, name in enumerate(CAPABILITIES)}
    names = set(item.reference["capabilities"])
    return "_".join(sorted(names, key=lambda name: (order.get(name, len(order)), name)))


def _load_llava(files: BenchmarkFiles) -> list[Item]:
    path = files.file("mm-vet.json", "mm-vet/mm-vet.json")
    metadata = read_object(path)
    folder = files.image_folder("images", "mm-vet/images")
    asked_path = files.find("llava-mm-vet.jsonl")
    if asked_path:
        asked = read_jsonl(asked_path, ("question_id", "image", "text"))
    else:
        asked = [
            {"question_id": int(_bare(key)) if _bare(key).isdigit() else key, "image": value["imagename"]}
            for key, value in metadata.items()
        ]
    items = []
    for number, question in enumerate(asked, 1):
        where = f"{asked_path or path}, question {number}"
        key = f"v1_{_bare(question['question_id'])}"
        record: dict[str, Any] = metadata.get(key) or {}
        require(record, ("question", "answer", "capability"), f"{path}, {key}")
        items.append(
            Item(
                item_id=str(question["question_id"]),
                question_id=question["question_id"],
                prompt=question.get("text", record["question"]),
                images=(image_file(folder, question["image"], where),),
                category="_".join(record["capability"]),
                reference={
                    "question": record["question"],
                    "answer": record["answer"],
                    "capabilities": list(record["capability"]),
                },
            )
        )
    return items


def _load_hf(files: BenchmarkFiles) -> list[Item]:
    items = []
    for row in read_parquet(files.parquet("test"), ("question_id", "question", "answer", "capability")):
        values = row.values
        capabilities = [name.strip() for name in values["capability"].split(",")]
        items.append(
            Item(
                item_id=str(values["question_id"]),
                question_id=values["question_id"],
                prompt=values["question"],
                images=(row.image(),),
                category="_".join(capabilities),
                reference={
                    "question": values["question"],
                    "answer": values["answer"],
                    "capabilities": capabilities,
                },
            )
        )
    return items
