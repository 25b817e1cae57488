"""Video-MME: 2,700 multiple-choice questions about 900 videos, short, medium and long."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, extract_lmms, first_capital
from tinylmm.evaluation.benchmarks.files import read_parquet
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, pick_variant
from tinylmm.evaluation.benchmarks.video import VideoRef, read_srt, subtitles_at, video_path
from tinylmm.evaluation.benchmarks.video_choice import by_leading_letter, by_letter, known_letter, scores_of

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

GET = "videomme/test-00000-of-00001.parquet, videos and subtitles are in https://huggingface.co/datasets/lmms-lab/Video-MME."
SAMPLING = SamplingSpec(uniform=16, distinct=True)
"""TinyLLaVA-Video's: of a clip that is shorter than 16 frames each frame once."""
DURATIONS = ("short", "medium", "long")
_FIELDS = ("videoID", "question_id", "question", "options", "answer", "duration")
_OPTIONAL = ("video_id", "domain", "sub_category", "task_type")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.*?)\s*$", re.DOTALL)
_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
"""As the first official script has them: the last two are pairs that a missing comma glued together, and never occur."""
_LATER_PREFIXES = (*_PREFIXES, "Answer:", "Option:", "The correct answer", "The correct option")
"""As the official script has them now (thanku-all/parse_answer), in the order in which they are taken away."""
_LETTERS = "ABCD"


def parse_official(text: str, prefixes: Sequence[str] = _LATER_PREFIXES) -> str | None:
    """The official script: take the prefixes away, then the first capital A to D anywhere."""
    return first_capital(text, prefixes, _LETTERS)


_READERS: dict[str, Callable[[str], str | None]] = {
    "official": parse_official,
    "lmms": lambda text: extract_lmms(text, _LETTERS),
    "lmms_regex": lambda text: parse_official(text, _PREFIXES),
}


class VideoMME(Benchmark):
    """Video-MME, without subtitles unless they are asked for.

    Variants: `tinyllava_video` (TinyLLaVA-Video's parser, guesses drawn from the item's id), `official` (unread answers leave
    the denominator and are counted as `left_out`), `lmms` (lmms-eval's own extractor, over all questions) and `lmms_regex`
    (lmms-eval before it: the first official script's reading, over all questions).
    Aggregate: `overall`, `short`, `medium`, `long`, then `domain/...` and `task/...`; percent, one decimal.
    """

    name = "videomme"
    variants = ("tinyllava_video", "official", "lmms", "lmms_regex")
    headline = "overall"
    max_new_tokens = 1024

    def __init__(self, split: str | None = None, subtitles: bool = False) -> None:
        """Args: subtitles: ask as the benchmark's authors do with subtitles, of which a video without a file has none."""
        super().__init__(split)
        self.subtitles = subtitles

    def prompt_at(self, item: Item, times: Callable[[], Sequence[float]]) -> str:
        """With subtitles `subtitle_prompt`, of those that are shown at the frames."""
        return (
            subtitle_prompt(item, subtitles_at(item.reference["subtitles"], times())) if self.subtitles else item.prompt
        )

    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read `videomme/test-*.parquet`, in either layout. Videos are data/<videoID>.mp4, subtitles subtitle/<videoID>.srt."""
        files = BenchmarkFiles.under(root, GET, "Video-MME", "videomme", "VideoMME")
        videos, subtitles = files.image_folder("data"), files.image_folder("subtitle")
        items = []
        for row in read_parquet(files.parquet("test", "videomme"), _FIELDS, _OPTIONAL):
            values = row.values
            options = _options(values["options"], row.where)
            known_letter(values["answer"], options, row.where)
            video = VideoRef(
                video_path(videos, f"{values['videoID']}.mp4", row.where),
                subtitles=video_path(subtitles, f"{values['videoID']}.srt", row.where),
                sampling=SAMPLING,
            )
            lines = "\n".join(values["options"])
            items.append(
                Item(
                    item_id=str(values["question_id"]),
                    question_id=values["question_id"],
                    prompt=f"{values['question']}\n{lines}\n{LETTER_SUFFIX}",
                    images=(video.shown,),
                    category=values["duration"],
                    reference={
                        "options": options,
                        "answer": values["answer"],
                        "question": f"{values['question']}\n{lines}",
                        "domain": values["domain"] or "",
                        "task": values["task_type"] or "",
                        "video": video,
                        **self._subtitles(video),
                    },
                    options=len(options),
                )
            )
        return items

    def _subtitles(self, video: VideoRef) -> dict[str, Any]:
        assert video.subtitles is not None  # `load` says where they would be
        if not self.subtitles:
            return {}
        return {"subtitles": tuple(read_srt(video.subtitles)) if video.subtitles.is_file() else ()}

    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score by letters; see the class for variants and metrics."""
        variant = pick_variant(self, variant)

        def read(item: Item, text: str) -> ItemScore | None:
            if variant == "tinyllava_video":
                return by_leading_letter(item, text)
            letter = _READERS[variant](text)
            if letter is None and variant == "official":
                return ItemScore(item.item_id, None)
            return by_letter(item, letter)

        return scores_of(self, variant, items, answers, read, _metrics)


def official_prompt(item: Item) -> str:
    """The official prompt without subtitles."""
    return (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
        f"(A, B, C, or D) of the correct option.\n{item.reference['question']}\nThe best answer is:"
    )


def subtitle_prompt(item: Item, lines: Sequence[str]) -> str:
    """The official prompt with the subtitles shown at the sampled frames (`video.subtitles_at`)."""
    return (
        "This video's subtitles are listed below:\n" + "\n".join(lines) + "\nSelect the best answer to the following "
        "multiple-choice question based on the video and the subtitles. Respond with only the letter (A, B, C, or D) of the "
        f"correct option.\n{item.reference['question']}\nThe best answer is:"
    )


def _options(texts: Any, where: str) -> dict[str, str]:
    """`["A. Red.", ...]` by letter, without the full stop that ends each (TinyLLaVA-Video cuts the last character off)."""
    found = [_OPTION.match(text) for text in texts or ()]
    if not found or not all(found):
        raise DataError(f"{where}: options must read 'A. text'; found {texts!r}. Fetch the file again.")
    return {match.group(1): match.group(2).removesuffix(".") for match in found if match}


def _metrics(rows: Graded) -> Metrics:
    metrics = Metrics(digits=1)
    metrics.mean("overall", rows)
    for duration in DURATIONS:
        within = [(item, score) for item, score in rows if item.category == duration]
        if within:
            metrics.mean(duration, within)
    metrics.means_by("domain", rows, lambda item: str(item.reference["domain"]))
    metrics.means_by("task", rows, lambda item: str(item.reference["task"]))
    return metrics
