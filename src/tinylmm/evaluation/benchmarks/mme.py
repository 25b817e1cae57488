"""MME: two yes-or-no questions an image in 14 tasks; perception and cognition are sums of task scores, not means.

Sources: MME's eval_tool/calculation.py; LLaVA's convert_answer_to_mme.py; lmms-eval's mme.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_parquet, read_text
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.pairing import pair_by_prompt, unique_ids
from tinylmm.evaluation.benchmarks.prompts import SHORT_ANSWER, question_in, read_questions
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, count_items, pick_variant

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = (
    "The question file is in LLaVA's eval.zip; MME_Benchmark_release_version is given out by MME's authors on request "
    "(github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation)."
)
QUESTIONS = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
YES_NO = "Please answer yes or no."
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASK_TOP = 200.0
"""A task's best score: all answers right, and with them all images."""


def official_answer(text: str) -> str | None:
    """The tool's rule: "yes", else "no", anywhere in the first four characters, lower case, not stripped; else None.

    So "know", "nose" and "snow" are no, "eyes" is yes, "  yes" and "The answer is yes" are nothing, which is wrong.
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def lmms_answer(text: str) -> str | None:
    """lmms-eval: stripped, periods deleted, "y" and "n" taken; then the official rule."""
    word = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(word) or official_answer(word)


class MME(Benchmark):
    """`perception` (0 to 2000, what papers report), `cognition` (0 to 800), and score (0 to 200), acc, acc+ a task.

    A task's score is the percentage of right answers plus the percentage of images with both answers right.
    """

    name: ClassVar[str] = "mme"
    variants: ClassVar[tuple[str, ...]] = ("llava", "official", "lmms")
    headline: ClassVar[str] = "perception"
    max_new_tokens: ClassVar[int] = 128

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read LLaVA's question file; the right answers come from the release's text files, by image and question."""
        files = BenchmarkFiles.under(root, GET, "MME")
        if layout == "hf":
            return self._load_hf(files)
        questions = read_questions(files.file(QUESTIONS))
        release = files.file(f"{RELEASE}/MME_Benchmark", RELEASE)  # the later archive has one more folder
        truth: dict[str, dict[str, str]] = {}
        items = []
        for name, row in zip(unique_ids(question["question_id"] for question in questions), questions, strict=True):
            where = f"{QUESTIONS}, question {name}"
            image, question = str(row["question_id"]), _bare(row["text"])
            if image not in truth:
                truth[image] = _read_truth(files, release, image, where)
            if question not in truth[image]:
                raise DataError(f"{where}: the release has no answer to {question!r}. {GET}")
            task = PurePosixPath(image).parts[0]
            file = image_file(release, row["image"], where)
            items.append(Item(name, row["question_id"], row["text"], (file,), task, truth[image][question], options=2))
        return items

    def _load_hf(self, files: BenchmarkFiles) -> list[Item]:
        rows = read_parquet(files.parquet("test"), ("question_id", "question", "answer", "category"))
        items = []
        for name, row in zip(unique_ids(row.values["question_id"] for row in rows), rows, strict=True):
            text, task = _bare(row.values["question"]) + SHORT_ANSWER, row.values["category"]
            answer = _truth(row.values["answer"], row.where)
            items.append(Item(name, row.values["question_id"], text, (row.image(),), task, answer, options=2))
        return items

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score; answers with tabs or newlines, which break MME's tool, are like any other here."""
        variant = pick_variant(self, variant)
        parse = lmms_answer if variant == "lmms" else official_answer
        rows, tasks = [], defaultdict[str, list[tuple[Item, float]]](list)
        for item in items:
            answer = answers.get(item.item_id)
            parsed = None if answer is None else parse(answer.text)
            rows.append(ItemScore(item.item_id, float(parsed == item.reference), parsed))
            tasks[item.category].append((item, float(parsed == item.reference)))
        metrics, counts = _metrics(tasks), count_items(items, answers, rows)
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)

    def group_of(self, item: Item) -> str:
        """As `Benchmark.group_of`: the two questions about an image are right together or not."""
        return str(item.question_id)

    def pair(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Answer]:
        """Match by image and question: the two questions about an image share its path as their id."""
        return pair_by_prompt(items, rows, _bare)


def _metrics(tasks: Mapping[str, Graded]) -> Metrics:
    """The two totals, then the metrics of each task, from the questions of each task."""
    each = Metrics(digits=None)
    for task in [*PERCEPTION, *COGNITION, *sorted(tasks.keys() - {*PERCEPTION, *COGNITION})]:
        if tasks.get(task):
            images: dict[str, list[tuple[Item, float]]] = {}
            for item, right in tasks[task]:
                images.setdefault(str(item.question_id), []).append((item, right))
            both = [(image[0][0], float(all(right for _, right in image))) for image in images.values()]
            each.mean(f"{task}/acc", tasks[task])
            each.mean(f"{task}/acc+", both, grouped=True)
            score = each.aggregate[f"{task}/acc"] + each.aggregate[f"{task}/acc+"]
            each.other(f"{task}/score", score, (item for item, _ in tasks[task]), top=TASK_TOP)
    totals = Metrics(digits=None)
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [task for task in members if tasks.get(task)]
        total = sum((each.aggregate[f"{task}/score"] for task in found), 0.0)
        items = [item for task in found for item, _ in tasks[task]]
        totals.other(name, total, items, top=TASK_TOP * max(len(found), 1))
    totals.aggregate |= each.aggregate
    totals.bases |= each.bases
    return totals


def _bare(text: str) -> str:
    """The question itself: without LLaVA's suffix or MME's own (which one or two spaces precede)."""
    return question_in(text).removesuffix(YES_NO).rstrip()


def _read_truth(files: BenchmarkFiles, release: Path, image: str, where: str) -> dict[str, str]:
    """Question -> yes or no, of one image: its .txt lies beside it, or in `questions_answers_YN`."""
    parts = PurePosixPath(image).parts
    if len(parts) < 2 or ".." in parts or PurePosixPath(image).is_absolute():
        raise DataError(f"{where}: the id must be `<task>/<image>`. {GET}")
    name = PurePosixPath(image).stem + ".txt"
    folder = release / parts[0]
    looked = [folder / "questions_answers_YN" / name, folder / name, (release / image).with_suffix(".txt")]
    path = next((candidate for candidate in looked if candidate.is_file()), None)
    if path is None:
        raise files.missing(name, looked)
    truth = {}
    for line in read_text(path).split("\n"):
        if line.strip():
            question, tab, answer = line.strip().rpartition("\t")
            if not tab:
                raise DataError(f"{path}: the line {line.strip()!r} is no question, tab and answer. {GET}")
            truth[_bare(question)] = _truth(answer, str(path))
    return truth


def _truth(value: Any, where: str) -> str:
    answer = str(value).lower().strip().replace(".", "")
    if answer not in ("yes", "no"):
        raise DataError(f"{where}: the right answer is {value!r}; allowed: yes, no. {GET}")
    return answer
