"""What every benchmark has in common: items to ask, answers to score, figures in the papers' units.

Scoring is a pure step: `Benchmark.score` reads items and texts and nothing else, so a kept answer file can be scored again
at any time, by any variant. What is random elsewhere (a guess for an unparsed answer) has a fixed seed and is counted here.
No torch: `tinylmm score` answers on a laptop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge

Format = Literal["llava", "hf"]
"""`llava`: question files of LLaVA's eval.zip beside the official annotations; `hf`: Hugging Face parquet columns."""


@dataclass(frozen=True)
class ImageRef:
    """An image of an item: a file, or a cell of a parquet file.

    Attributes:
        path: image file, or parquet file.
        row, column: the cell; None for an image file. A parquet cell holds `{"bytes", "path"}` as `datasets` writes it.
        data: the encoded bytes themselves, where the benchmark's file carries them (MMBench's base64).
    """

    path: Path
    row: int | None = None
    column: str | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Equal for equal images of one benchmark; the tower runs once a key."""
        return str(self.path) if self.row is None else f"{self.path}#{self.row}.{self.column}"

    def open(self) -> Image.Image:
        """Decode to RGB, with the pixel limit and the error messages of `data/images.py`.

        Raises:
            DataError: missing, broken or too large; the message names file and row.
        """
        from tinylmm.evaluation.benchmarks.files import open_image_ref

        return open_image_ref(self)


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    Attributes:
        item_id: unique in its benchmark, in the order of the question file (TextVQA's question_id is not: it gets a
            suffix). Generations and per-item scores are joined by it.
        question_id: as the benchmark's own files spell it; what answer files and uploads carry.
        prompt: the finished user text, suffix included, without image slots.
        images: none, one or several, in the order in which the prompt means them; they stand in front of the text.
        category: what results are broken down by.
        reference: what scoring needs; each benchmark's own.
        options: how many answers a uniform guesser chooses from; 0 where the question is open.
    """

    item_id: str
    question_id: str | int
    prompt: str
    images: tuple[ImageRef, ...] = ()
    category: str = ""
    reference: Any = None
    options: int = 0


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
class Scores:
    """Result of scoring.

    Attributes:
        benchmark, variant: name the protocol; figures of different variants are not comparable.
        aggregate: named figures in the papers' units, the headline first; `group/name` for breakdowns.
        per_item: in the order of the question file, one an item, also for missing answers.
        counts: at least `scored`, `missing` (no answer given) and `unparsed` (an answer nothing could be read from).
    """

    benchmark: str
    variant: str
    aggregate: dict[str, float]
    per_item: tuple[ItemScore, ...]
    counts: dict[str, int]

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


class Benchmark(ABC):
    """One benchmark: reads its official files, says what to ask, scores answers. Instances hold options, no state.

    Attributes:
        name: key in `BENCHMARKS` and argument of `tinylmm score`.
        variants: scoring protocols; the first is the default, LLaVA's and TinyLLaVA's (it reproduces the papers).
        headline: key of `Scores.aggregate` that papers report.
        max_new_tokens: of the published script.
        judged: whether a variant needs a judge model.
        splits: the splits to choose from, where there are several; `load` takes the first whose files are there if none is
            chosen.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    max_new_tokens: ClassVar[int]
    judged: ClassVar[bool] = False
    splits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, split: str | None = None) -> None:
        """Choose a split.

        Raises:
            ConfigError: the benchmark has no such split.
        """
        if split is not None and split not in self.splits:
            from tinylmm.errors import ConfigError, Fault

            allowed = (
                f"Allowed: {', '.join(self.splits)}." if self.splits else "It has one split; leave the option out."
            )
            raise ConfigError([Fault("split", f"{self.name} has no split '{split}'.", allowed)])
        self.split = split

    @abstractmethod
    def load(self, root: Path, layout: Format = "llava") -> list[Item]:
        """Read the items in the order of the question file.

        Raises:
            DataError: a file is missing (which, where it is looked for, where to get it), or a record is broken.
        """

    @abstractmethod
    def score(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        variant: str | None = None,
        judge: Judge | None = None,
    ) -> Scores:
        """Score answers, keyed by `Item.item_id`. Never raises on empty, missing or all-equal answers.

        Raises:
            ConfigError: the variant is unknown; the message lists those that exist.
        """

    def join(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """Match the rows of an answer file (`question_id`, `text`, `prompt`) to items, by content, never by position.

        The default joins by question id; benchmarks whose ids are not unique override it. Of an item that is answered
        twice the later row counts, as in LLaVA's scripts; the command counts such rows as `duplicate`.

        Raises:
            DataError: an answered id belongs to no item.
        """
        from tinylmm.evaluation.benchmarks.files import join_by_question_id

        return join_by_question_id(items, rows)

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write the file that the benchmark's server takes. Only benchmarks with a server have one.

        Raises:
            ConfigError: this benchmark has no upload format.
        """
        from tinylmm.errors import ConfigError, Fault

        raise ConfigError([Fault("benchmark", f"{self.name} has no upload file; it is scored locally.")])
