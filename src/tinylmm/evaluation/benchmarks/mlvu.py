"""MLVU (dev): multiple-choice questions of seven tasks about long videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import lettered
from tinylmm.evaluation.benchmarks.files import read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, percent, pick_variant
from tinylmm.evaluation.benchmarks.video import VideoRef, video_path
from tinylmm.evaluation.benchmarks.video_choice import (
    by_leading_letter,
    choices,
    known_letter,
    numbered_item,
    scores_of,
)

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
        tasks = len({item.category for item in items})
        return scores_of(self, variant, items, answers, by_leading_letter, _metrics, tasks=tasks)


def _metrics(rows: Graded) -> Metrics:
    metrics = Metrics()
    by_task: dict[str, list[float]] = {}
    for item, score in rows:
        by_task.setdefault(item.category, []).append(score)
    average = percent(sum(scores) / len(scores) for scores in by_task.values())
    metrics.other("average", average, [item for item, _ in rows])
    metrics.mean("accuracy", rows)
    metrics.means_by("task", rows, lambda item: item.category)
    return metrics


def _item(files: BenchmarkFiles, task: str, number: int, record: Any, where: str) -> Item:
    require(record, ("video", "question", "candidates", "answer"), where)
    options, gold = choices(record, where)
    folder = files.image_folder(f"video/{TASKS[task]}", f"video/{task}", TASKS[task])
    video = VideoRef(video_path(folder, record["video"], where), sampling=SAMPLING)
    return numbered_item(task, number, str(record["question"]), options, gold[0], video)


def _table(files: BenchmarkFiles) -> list[Item]:
    """The rows of the parquet file: the question has its options behind it, the answer is a letter."""
    items, counts = [], dict.fromkeys(TASKS, 0)
    for row in read_parquet(files.parquet("test"), _COLUMNS):
        task, values = row.values["task_type"], row.values
        if task not in TASKS:
            raise DataError(f"{row.where}: task_type {task!r} is none of {', '.join(TASKS)}. Fetch the file again.")
        options = lettered(str(text) for text in values["candidates"])
        gold = known_letter(values["answer"], options, row.where)
        folder = files.image_folder(f"video/{TASKS[task]}", f"video/{task}", "MLVU_dev", "video")
        question = str(values["question"]).split("\n(A)")[0]
        video = VideoRef(video_path(folder, values["video_name"], row.where), sampling=SAMPLING)
        items.append(numbered_item(task, counts[task], question, options, gold, video))
        counts[task] += 1
    return items
