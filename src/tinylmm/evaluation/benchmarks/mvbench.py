"""MVBench: twenty temporal tasks with 200 multiple-choice questions each, about short videos."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, pick_variant
from tinylmm.evaluation.benchmarks.video import VideoRef, video_path
from tinylmm.evaluation.benchmarks.video_choice import Reading, by_leading_letter, choices, numbered_item, scores_of

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "json/ and video/ are in https://huggingface.co/datasets/OpenGVLab/MVBench."
TASKS = {
    "action_sequence": ("star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "moving_direction": ("clevrer/video_validation", False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": ("perception/videos", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "state_change": ("perception/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": ("perception/videos", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", False),
}
"""Task -> folder of its videos under video/, and whether its questions are about a part (start, end), in the official order.
TinyLLaVA-Video shows all of an mp4 file, whatever the part: only its readers of frames and of other formats cut it out. That
fault is not copied."""

SPREAD, SEGMENTS = SamplingSpec(uniform=16), SamplingSpec(segments=16)
"""TinyLLaVA-Video's frames: of most files, and of AVI and WebM files and folders of frames. A part that a question is about is
kept to in both, which its reader of most files does not do."""
_SEGMENTED = (".avi", ".webm")
_FRAMES = "episodic_reasoning"
"""TVQA comes as folders of frames, three a second."""


class MVBench(Benchmark):
    """MVBench.

    Variants: `tinyllava_video` (TinyLLaVA-Video's prompt and parser), `official` (VideoChat2's `check_ans`, for answers that
    continue "Best option:("; an empty one counts as right there, and here) and `lmms` (lmms-eval; empty answers leave the
    denominator and are counted as `left_out`).
    Aggregate: `average`, correct over all questions, and one metric a task; percent. A guess is drawn from the item's id.
    counts.tasks says how many of the twenty tasks were there.
    """

    name = "mvbench"
    variants = ("tinyllava_video", "official", "lmms")
    headline = "average"
    max_new_tokens = 1024

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `json/<task>.json` of every task that is there, in the official order; `<task>/*.parquet` too for `hf`.

        The files have no ids; an item's is `<task>/<number>`, from 0.
        """
        files = BenchmarkFiles.under(root, GET, "MVBench", "mvbench")
        items = []
        for task in TASKS:
            records = _records(files, task, layout)
            items += [_item(files, task, n, record, where) for n, (record, where) in enumerate(records)]
        if not items:
            names = [f"json/{task}.json" for task in TASKS]
            raise files.missing("json/<task>.json", files.candidates(names[:1]))
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
        tasks = list(dict.fromkeys(item.category for item in items))

        def metrics_of(rows: Graded) -> Metrics:
            metrics = Metrics()
            metrics.mean("average", rows)
            for task in tasks:
                metrics.mean(f"task/{task}", [row for row in rows if row[0].category == task])
            return metrics

        return scores_of(self, variant, items, answers, _READINGS[variant], metrics_of, tasks=len(tasks))

    def pair(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """By id (`action_count/3`, `action_count_3`, `Action Count/3`), else by what was asked, else by number.

        The files have no ids, so an answer file may have any. With other ids, a row belongs to the item whose question and
        options are in its prompt; of items that are asked in the same words (about other videos) the k-th row takes the
        k-th. Where no prompt says that much, ids that number all items, from 0 or from 1, are taken for their places.

        Raises:
            DataError: none of these ways fits.
        """
        ids = {_plain(item.item_id): item.item_id for item in items}
        if all(_plain(row["question_id"]) in ids for row in rows):
            found = [ids[_plain(row["question_id"])] for row in rows]
        else:
            by_prompt = _by_prompt(items, rows)
            numbers = [int(row["question_id"]) for row in rows if str(row["question_id"]).isdecimal()]
            if any(by_prompt):
                found = [
                    _known(name, number, row) for number, (name, row) in enumerate(zip(by_prompt, rows, strict=True), 1)
                ]
            elif sorted(numbers) in ([*range(len(items))], [*range(1, len(items) + 1)]):
                found = [items[number - min(numbers)].item_id for number in numbers]
            else:
                raise DataError(
                    f"{len(rows)} answers to {len(items)} questions have neither known ids nor prompts: they cannot be "
                    "matched. Use the ids <task>/<number from 0>, or keep the prompts."
                )
        return {name: Answer(row["text"], row.get("prompt")) for name, row in zip(found, rows, strict=True)}


def official_is_right(text: str, gold: str) -> bool:
    """VideoChat2's `check_ans`: the first word of the answer, lower case and without full stops, is inside the gold option's
    "(a)" or contains it. The answer continues "Best option:(", so a bracket is put in front.
    """
    first_line = "(" + text.strip().split("\n")[0]
    word = first_line.lower().split(" ")[0]
    letter = gold.lower().split(" ")[0]
    return word.replace(".", "") in letter or letter in word


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_OPTION = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


def read_lmms(text: str) -> str:
    """lmms-eval's `mcq_acc`: `X. ...` in front, else the first letter A to E that stands alone, of either case; else the text.

    So in "This is a dog" the article is read as A.
    """
    match = _OPTION.match(text.strip())
    if match:
        return match.group(1).upper()
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    digits = re.search(r"\d,\d", plain) is not None
    cleaned = plain
    for mark in _PUNCTUATION:
        spaced = f"{mark} " in plain or f" {mark}" in plain or digits
        cleaned = cleaned.replace(mark, "" if spaced else " ")
    cleaned = _PERIOD.sub("", cleaned, count=32).strip("'").strip('"').strip(")").strip("(").strip().lower()
    letter = re.search(r"\b([a-e])\b", cleaned)
    return letter.group(1).upper() if letter else cleaned


def _by_first_word(item: Item, text: str) -> ItemScore:
    gold = item.reference["answer"]
    right = official_is_right(text, f"({gold}) {item.reference['options'][gold]}")
    return ItemScore(item.item_id, float(right), text.strip().split("\n")[0] or None)


def _by_lone_letter(item: Item, text: str) -> ItemScore:
    said = read_lmms(text)
    score = None if text == "" else float(said == item.reference["answer"])
    return ItemScore(item.item_id, score, said if said in item.reference["options"] else None)


_READINGS: dict[str, Reading] = {
    "tinyllava_video": by_leading_letter,
    "official": _by_first_word,
    "lmms": _by_lone_letter,
}


def _records(files: BenchmarkFiles, task: str, layout: Format) -> list[tuple[dict[str, Any], str]]:
    path = files.find(f"json/{task}.json", f"{task}.json")
    if path is not None:
        return [(record, f"{path}, record {number}") for number, record in enumerate(read_list(path), 1)]
    folder = files.find(task) if layout == "hf" else None
    if folder is None:
        return []
    rows = read_parquet(
        sorted(folder.glob("*.parquet")), ("video", "question", "candidates", "answer"), ("start", "end")
    )
    return [(row.values, row.where) for row in rows]


def _item(files: BenchmarkFiles, task: str, number: int, record: dict[str, Any], where: str) -> Item:
    require(record, ("video", "question", "candidates", "answer"), where)
    options, gold = choices(record, where)
    folder, bounded = TASKS[task]
    video = VideoRef(
        video_path(files.image_folder("video") / folder, record["video"], where),
        start=record.get("start") if bounded else None,
        end=record.get("end") if bounded else None,
        fps=3.0 if task == _FRAMES else None,
        sampling=SPREAD if task != _FRAMES and Path(record["video"]).suffix.lower() not in _SEGMENTED else SEGMENTS,
    )
    return numbered_item(task, number, str(record["question"]), options, gold[-1], video)


def _plain(name: object) -> str:
    return re.sub(r"[\s/_-]+", "_", str(name)).lower()


def _by_prompt(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The item that each row's prompt asks about; None where there is none, or it has been taken by the rows before."""
    waiting: dict[tuple[str, ...], list[str]] = defaultdict(list)
    exact = {}
    for item in items:
        words = (item.reference["question"], *item.reference["options"].values())
        waiting[words].append(item.item_id)
        exact[item.prompt] = words
    longest_first = sorted(waiting, key=lambda words: -sum(map(len, words)))
    found: list[str | None] = []
    for row in rows:
        prompt = (row.get("prompt") or "").replace("<image>", "").strip()
        words = exact.get(prompt) or next((w for w in longest_first if _says(prompt, w)), ())
        found.append(waiting[words].pop(0) if waiting.get(words) else None)
    return found


def _known(name: str | None, number: int, row: Mapping[str, Any]) -> str:
    if name is None:
        raise DataError(
            f"answer {number}, question_id {row['question_id']!r}: its prompt asks no question of these files (any more). "
            "Score the answers against the files they were made from."
        )
    return name


def _says(prompt: str, words: Sequence[str]) -> bool:
    """Whether question and options stand in the prompt, in this order."""
    place = 0
    for word in words:
        place = prompt.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True
