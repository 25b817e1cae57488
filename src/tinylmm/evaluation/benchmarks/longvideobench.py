"""LongVideoBench (validation): 1,337 questions about videos of seconds to an hour, asked with subtitles among the frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, LETTERS, first_capital, lettered, listing
from tinylmm.evaluation.benchmarks.files import read_list, read_parquet, require
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, pick_variant
from tinylmm.evaluation.benchmarks.video import Subtitle, VideoRef, seconds_of, video_path
from tinylmm.evaluation.benchmarks.video_choice import by_leading_letter, by_letter, scores_of

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "lvb_val.json, videos/ and subtitles/ (unpacked) are in https://huggingface.co/datasets/longvideobench/LongVideoBench."
SAMPLING = SamplingSpec(left_edge=16)
"""Its authors' loader with 16 frames, which TinyLLaVA-Video's script asks for: one a second, at most 16."""
FRAME = "[image]"
"""Stands in the text for each frame, in TinyLLaVA-Video's script; the frames themselves stand in front of all."""
_FIELDS = ("id", "video_path", "question", "correct_choice", "duration", "duration_group", "question_category")
_SUBTITLED = ("subtitle_path", "starting_timestamp_for_subtitles")
_OPTIONS = tuple(f"option{number}" for number in range(5))
_NONE = "N/A"
"""An option of the parquet file that a question does not have."""
_SHORTEST = 1.0
"""Seconds; a subtitle that is shown for less counts as shown for so long."""
_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
"""As lmms-eval has them, in the order in which they are taken away."""


class LongVideoBench(Benchmark):
    """LongVideoBench.

    Variants: `tinyllava_video` (TinyLLaVA-Video's parser) and `lmms` (lmms-eval's, which is its authors': the first capital
    letter behind some phrases); both guess where they read nothing, here by the item's id. Faults of TinyLLaVA-Video's script
    that are not copied: options are compared whole, a subtitle that begins with "Question:" does not end the list, and one
    without an end lasts until the clip's, also where the clip begins within a film.
    Aggregate: `overall`, over all questions, `duration/...` by the group's longest seconds, and `category/...`; percent.
    """

    name = "longvideobench"
    variants = ("tinyllava_video", "lmms")
    headline = "overall"
    max_new_tokens = 1024

    def __init__(self, split: str | None = None, subtitles: bool = True) -> None:
        """Args: subtitles: whether they are shown, as in TinyLLaVA-Video's figures; lmms-eval asks without."""
        super().__init__(split)
        self.subtitles = subtitles

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `lvb_val.json`, or for `hf` `validation-*.parquet` where that is not there; with subtitles `subtitles/` too."""
        files = BenchmarkFiles.under(root, GET, "LongVideoBench", "longvideobench")
        return [self._item(files, record, where) for record, where in _records(files, layout)]

    def prompt_at(self, item: Item, times: Callable[[], Sequence[float]]) -> str:
        """With the subtitles that are shown at one of the frames, each where it comes among them.

        Raises:
            DataError: the file of the subtitles is missing.
        """
        if not self.subtitles:
            return item.prompt
        found = item.reference["subtitles"]
        if found is None:
            path = item.reference["video"].subtitles
            raise DataError(
                f"{path}: the subtitles of question {item.item_id} are not there. Unpack subtitles.tar there, or set "
                "options.subtitles=false."
            )
        return f"subtitles:{''.join(interleaved(found, times()))}\nquestion: \n{item.prompt}"

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters; see the class for variants and metrics."""
        variant = pick_variant(self, variant)
        read = by_leading_letter if variant == "tinyllava_video" else _by_first_capital
        return scores_of(self, variant, items, answers, read, _metrics)

    def _item(self, files: BenchmarkFiles, record: Mapping[str, Any], where: str) -> Item:
        require(record, (*_FIELDS, "candidates", *(_SUBTITLED if self.subtitles else ())), where)
        candidates, correct = record["candidates"], record["correct_choice"]
        if not isinstance(candidates, list) or not isinstance(correct, int) or not 0 <= correct < len(candidates):
            raise DataError(
                f"{where}: correct_choice {correct!r} is no place among {candidates!r}. Fetch the file again."
            )
        options, subtitles, words = lettered(str(text) for text in candidates), None, {}
        if self.subtitles:
            subtitles = video_path(files.image_folder("subtitles"), record["subtitle_path"], where)
            offset = float(record["starting_timestamp_for_subtitles"])
            found = read_subtitles(subtitles, offset, float(record["duration"])) if subtitles.is_file() else None
            words = {"subtitles": found}
        path = video_path(files.image_folder("videos"), record["video_path"], where)
        video = VideoRef(path, subtitles=subtitles, sampling=SAMPLING)
        return Item(
            item_id=str(record["id"]),
            question_id=record["id"],
            prompt=f"{record['question']}\n{listing(options)}\n{LETTER_SUFFIX}",
            images=(video.shown,),
            category=str(record["question_category"]),
            reference={
                "options": options,
                "answer": LETTERS[correct],
                "duration": str(record["duration_group"]),
                "video": video,
                **words,
            },
            options=len(options),
        )


def read_subtitles(path: Path, offset: float, length: float) -> tuple[Subtitle, ...]:
    """The subtitles of a file, by seconds of the clip.

    Args:
        path: JSON, a list of {"timestamp": [start, end], "text"} or {"start": "00:00:01.5", "end", "line"}.
        offset: seconds of the film at which the clip begins.
        length: seconds of the clip, at which a subtitle without an end ends.

    Raises:
        DataError: the file is of another form.
    """
    found = []
    for number, row in enumerate(read_list(path), 1):
        try:
            if "timestamp" in row:
                (start, end), text = row["timestamp"], row["text"]
                end = max(start, length + offset) if end is None else end
            else:
                start, end, text = seconds_of(row["start"]), seconds_of(row["end"]), row["line"]
            found.append(Subtitle(float(start) - offset, float(end) - offset, str(text)))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, subtitle {number}: {row!r} has no times and text. Fetch the file again."
            ) from error
    return tuple(found)


def interleaved(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[str]:
    """`FRAME` for each frame and the subtitles that are shown at one, in the order of time; a subtitle's is its middle.

    Args:
        times: seconds of the frames, ascending.
    """
    told: list[str] = []
    frames = 0
    for one in subtitles:
        middle = (one.start + one.end) / 2
        while frames < len(times) and times[frames] <= middle:
            told.append(FRAME)
            frames += 1
        half = max(one.end - one.start, _SHORTEST) / 2
        if any(middle - half < time < middle + half for time in times):
            told.append(one.text)
    return told + [FRAME] * (len(times) - frames)


def _by_first_capital(item: Item, text: str) -> ItemScore | None:
    letter = first_capital(text, _PHRASES, LETTERS[:5])
    return None if letter is None else by_letter(item, letter)


def _metrics(rows: Graded) -> Metrics:
    metrics = Metrics()
    metrics.mean("overall", rows)
    for group in sorted({item.reference["duration"] for item, _ in rows}, key=lambda name: (len(name), name)):
        metrics.mean(f"duration/{group}", [row for row in rows if row[0].reference["duration"] == group])
    metrics.means_by("category", rows, lambda item: item.category, ordered=True)
    return metrics


def _records(files: BenchmarkFiles, layout: Format) -> Iterator[tuple[Mapping[str, Any], str]]:
    path = files.find("lvb_val.json")
    if path is None and layout == "hf" and files.has_parquet("validation"):
        for row in read_parquet(files.parquet("validation"), (*_FIELDS, *_OPTIONS[:2]), (*_SUBTITLED, *_OPTIONS[2:])):
            candidates = [row.values[name] for name in _OPTIONS if row.values[name] not in (None, _NONE)]
            yield row.values | {"candidates": candidates}, row.where
        return
    path = path or files.file("lvb_val.json")
    for number, record in enumerate(read_list(path), 1):
        yield record, f"{path}, record {number}"
