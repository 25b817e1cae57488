"""What a benchmark is made of: images, items, answers and scores. Plain records, which read no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinylmm.config.video import SamplingSpec

Format = Literal["llava", "hf"]
"""`llava`: question files of LLaVA's eval.zip beside the official annotations; `hf`: Hugging Face parquet columns."""


@dataclass(frozen=True)
class ImageRef:
    """Where an image or a video of an item is: a file, or a cell of a parquet file. `evaluation/images.py` opens it.

    Attributes:
        path: image file, or parquet file.
        row, column: the cell; None for an image file. A parquet cell holds `{"bytes", "path"}` as `datasets` writes it, or a
            list of such, of which the first is meant.
        data: the encoded bytes themselves, where the benchmark's file carries them (MMBench's base64).
        upright: it is turned as its camera says before it is shown.
        video: the file is a video, of which frames are shown.
        part: seconds from the start of the video between which the frames must lie; None for all of it.
        sampling: which frames, where the benchmark's protocol says it; None leaves it to the evaluation and the model.
        fps: frames a second of a video that is a folder of its frames, `00001.jpg`, `00002.jpg`, ...; None for a video file.
    """

    path: Path
    row: int | None = None
    column: str | None = None
    data: bytes | None = field(default=None, repr=False)
    upright: bool = False
    video: bool = False
    part: tuple[float, float] | None = None
    sampling: SamplingSpec | None = None
    fps: float | None = None

    @property
    def key(self) -> str:
        """Equal for equal images of one benchmark; the tower runs once a key."""
        if self.video and (self.part is not None or self.sampling is not None):
            return f"{self.path}#{self.part}{self.sampling.given() if self.sampling is not None else ''}"
        return str(self.path) if self.row is None else f"{self.path}#{self.row}.{self.column}"


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    Attributes:
        item_id: unique in its benchmark, in the order of the question file (TextVQA's question_id is not: it gets a
            suffix). Generations and per-item scores are paired by it.
        question_id: as the benchmark's own files spell it; what answer files and uploads carry.
        prompt: the finished user text, suffix included, without image slots.
        images: none, one or several, in the order in which the prompt means them; they stand in front of the text.
        category: what results are broken down by.
        reference: what scoring needs; each benchmark's own.
        options: how many answers a uniform guesser chooses from; 0 where the question is open.
        other_ids: what else answer files may call it, each for it alone (TextVQA's own question id); no part of what is asked.
        group: what its benchmark's `group_of` may go by; no part of what is asked.
    """

    item_id: str
    question_id: str | int
    prompt: str
    images: tuple[ImageRef, ...] = ()
    category: str = ""
    reference: Any = None
    options: int = 0
    other_ids: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model said of an item.

    Attributes:
        text: decoded without special tokens and stripped, as LLaVA's scripts keep it.
        prompt: what the answer file says was asked; None where it does not say.
    """

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class ItemScore:
    """Score of one item in [0, 1] unless the benchmark says otherwise (None: the item takes no part, e.g. not judged yet).

    `parsed` is what the scorer read out of the text, None where it could read nothing.
    """

    item_id: str
    score: float | None
    parsed: Any = None


@dataclass(frozen=True)
class Basis:
    """What a metric rests on: how many answers, whose chance they have, and how its interval is found.

    Attributes:
        items: ids of its units: of each question, or of one question of each group that is scored as one.
        values: of each unit, in [0, 1], where the metric is `top` times their mean; None for any other metric.
        over: where the metric is 100 times the sum of the values over the sum of these, one of each unit; else None.
        grouped: whether a unit is several questions (MMBench's rotations, MME's pairs).
        top: end of the metric's scale, which begins at 0; None where it has none.
    """

    items: tuple[str, ...]
    values: tuple[float, ...] | None = None
    grouped: bool = False
    top: float | None = 100.0
    over: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Scores:
    """Result of scoring.

    Attributes:
        benchmark, variant: name the protocol; metrics of different variants are not comparable.
        aggregate: metrics by name, in the papers' units, the headline first; `group/name` for breakdowns.
        per_item: in the order of the question file, one an item, also for missing answers.
        counts: at least `scored`, `missing` (no answer given) and `unparsed` (an answer nothing could be read from).
        bases: what each metric rests on; of one that is not named it is taken to be all questions, or those of the category
            in its name.
    """

    benchmark: str
    variant: str
    aggregate: dict[str, float]
    per_item: tuple[ItemScore, ...]
    counts: dict[str, int]
    bases: Mapping[str, Basis] = field(default_factory=dict)

    def as_json(self, items: Sequence[Item] = ()) -> dict[str, Any]:
        """The JSON of `tinylmm score --json`; `id` is the question file's own id where the items are given, else the item id.

        Raises:
            ValueError: `items` are not those that were scored.
        """
        ids = [item.question_id for item in items] if items else [row.item_id for row in self.per_item]
        return {
            "benchmark": self.benchmark,
            "variant": self.variant,
            "aggregate": self.aggregate,
            "per_item": [
                {"id": name, "score": row.score, "parsed": row.parsed}
                for name, row in zip(ids, self.per_item, strict=True)
            ],
            "counts": self.counts,
        }
