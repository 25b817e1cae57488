"""MLVU (dev): multiple-choice questions of seven tasks about long videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, guess, lettered, listing, parse_leading
from tinylmm.evaluation.benchmarks.files import read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded, percent, pick_variant
from tinylmm.evaluation.benchmarks.video import VideoRef, video_path

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "json/ and video/ are in https://huggingface.co/datasets/MLVU/MVLU; parquet rows in sy1998/MLVU_dev."
TASKS = {
    "count": "4_count",
    "ego": "3_ego",
    "needle": "2_needle",
    "order": "5_order",
    "plotQA": "1_plotQA",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}
"""Task -> name of its file below json/ and of its folder below video/, in TinyLLaVA-Video's order. The tasks that ask for words
(8_sub_scene, 9_summary) need a judge and are not among them."""
SAMPLING = SamplingSpec(uniform=16, distinct=True)
"""TinyLLaVA-Video's, as for Video-MME."""
_COLUMNS = ("video_name", "question", "candidates", "answer", "task_type")


class MLVU(Benchmark):
    """MLVU's multiple-choice tasks.

    Variant: `tinyllava_video` (its prompt and parser; guesses drawn from the item's id).
    Aggregate: `average`, the mean of the tasks' accuracies (M-Avg), then `accuracy` over all questions, and one metric a
    task; percent. counts.tasks says how many of the seven tasks were there.
    """

    name = "mlvu"
    variants = ("tinyllava_video",)
    headline = "average"
    max_new_tokens = 1024

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `json/<number>_<task>.json` of every task that is there; for `hf` `test-*.parquet` where none is.

        The files have no ids; an item's is `<task>/<number>`, from 0. Videos are video/<number>_<task>/<name>.
        """
        files = BenchmarkFiles.under(root, GET, "MLVU", "mlvu", "MLVU_dev")
        items = []
        for task, name in TASKS.items():
            path = files.find(f"json/{name}.json", f"{name}.json")
            records = [] if path is None else read_list(path)
            items += [_item(files, task, n, record, f"{path}, record {n + 1}") for n, record in enumerate(records)]
        if not items and layout == "hf":
            items = _table(files)
        if not items:
            raise files.missing(
                "json/1_plotQA.json", files.candidates([f"json/{name}.json" for name in TASKS.values()][:1])
            )
        return items

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        rows, guessed = [], 0
        for item in items:
            answer = answers.get(item.item_id)
            options, gold = item.reference["options"], item.reference["answer"]
            letter = parse_leading(answer.text, options) if answer else None
            guessed += answer is not None and letter is None
            chosen = letter or (guess(item.item_id, list(options)) if answer else None)
            rows.append(ItemScore(item.item_id, float(chosen == gold), letter))
        metrics, found = Metrics(), graded(items, rows)
        by_task: dict[str, list[float]] = {}
        for item, score in found:
            by_task.setdefault(item.category, []).append(score)
        metrics.other("average", percent(sum(scores) / len(scores) for scores in by_task.values()), items)
        metrics.mean("accuracy", found)
        metrics.means_by("task", found, lambda item: item.category)
        counts = count_items(items, answers, rows, guessed=guessed, tasks=len(by_task))
        return Scores(self.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)


def _item(files: BenchmarkFiles, task: str, number: int, record: Any, where: str) -> Item:
    require(record, ("video", "question", "candidates", "answer"), where)
    candidates = record["candidates"]
    if not isinstance(candidates, list):
        raise DataError(f"{where}: candidates {candidates!r} are no list. Fetch the file again.")
    options = lettered(str(text) for text in candidates)
    gold = [letter for letter, text in options.items() if text == str(record["answer"])]
    if not gold:
        raise DataError(f"{where}: answer {record['answer']!r} is no candidate. Fetch the file again.")
    folder = files.image_folder(f"video/{TASKS[task]}", f"video/{task}", TASKS[task])
    return _made(
        task,
        number,
        str(record["question"]),
        options,
        gold[0],
        VideoRef(video_path(folder, record["video"], where), sampling=SAMPLING),
    )


def _table(files: BenchmarkFiles) -> list[Item]:
    """The rows of the parquet file: the question has its options behind it, the answer is a letter."""
    items, counts = [], dict.fromkeys(TASKS, 0)
    for row in read_parquet(files.parquet("test"), _COLUMNS):
        task, values = row.values["task_type"], row.values
        if task not in TASKS:
            raise DataError(f"{row.where}: task_type {task!r} is none of {', '.join(TASKS)}. Fetch the file again.")
        options = lettered(str(text) for text in values["candidates"])
        if values["answer"] not in options:
            raise DataError(f"{row.where}: answer {values['answer']!r} is no option. Fetch the file again.")
        folder = files.image_folder(f"video/{TASKS[task]}", f"video/{task}", "MLVU_dev", "video")
        question = str(values["question"]).split("\n(A)")[0]
        video = VideoRef(video_path(folder, values["video_name"], row.where), sampling=SAMPLING)
        items.append(_made(task, counts[task], question, options, values["answer"], video))
        counts[task] += 1
    return items


def _made(task: str, number: int, question: str, options: Mapping[str, str], gold: str, video: VideoRef) -> Item:
    return Item(
        item_id=f"{task}/{number}",
        question_id=f"{task}/{number}",
        prompt=f"{question}\n{listing(options, '({}) {}').rstrip()}\n{LETTER_SUFFIX}",
        images=(video.shown,),
        category=task,
        reference={"options": options, "answer": gold, "question": question, "video": video},
        options=len(options),
    )
