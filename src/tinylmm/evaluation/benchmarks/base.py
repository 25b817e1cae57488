"""What every benchmark has in common: items to ask, answers to score, metrics in the papers' units.

Scoring is a pure step: `Benchmark.score` reads items and texts and nothing else, so a kept answer file can be scored again
at any time, by any variant. What is random elsewhere (a guess for an unparsed answer) has a fixed seed and is counted here.
No torch and no Pillow: `tinylmm score` answers on a laptop, and every plan may ask a benchmark what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinylmm.errors import ConfigError, Fault
from tinylmm.evaluation.benchmarks.pairing import pair_by_question_id
from tinylmm.evaluation.benchmarks.records import Answer, Format, Item, ItemScore, Scores

if TYPE_CHECKING:
    from tinylmm.evaluation.judge import Judge


class Benchmark(ABC):
    """One benchmark: reads its official files, says what to ask, scores answers. Instances hold options, no state.

    A benchmark is one module with one class derived from this one, and one YAML in conf/eval.

    Attributes:
        name: of ours, the module's; argument of `tinylmm score`.
        variants: scoring protocols; the first is the default, LLaVA's and TinyLLaVA's (it reproduces the papers).
        rules: how often what a variant says of the same answers was mended, from 1; a variant that is not named was never.
            A run scores anew, and asks, where this has grown.
        headline: key of `Scores.aggregate` that papers report.
        max_new_tokens: of the published script.
        judged: whether it needs a judge model.
        may_be_judged: whether a judge that is named reads what rules cannot; else a judge has no part in the scores.
        averages_runs: whether every answer is judged as often as `Judge.runs` says.
        top: best score of one item; above 1 a score is a judge's rating, by which no answer is right or wrong.
        upload: ending of the file that its server takes (`json`); empty where there is no server.
        splits: the splits to choose from, where there are several; `load` takes the first whose files are there if none is
            chosen.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    rules: ClassVar[Mapping[str, int]] = {}
    headline: ClassVar[str]
    max_new_tokens: ClassVar[int]
    judged: ClassVar[bool] = False
    may_be_judged: ClassVar[bool] = False
    averages_runs: ClassVar[bool] = False
    top: ClassVar[float] = 1.0
    upload: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, split: str | None = None) -> None:
        """Choose a split.

        Raises:
            ConfigError: the benchmark has no such split.
        """
        if split is not None and split not in self.splits:
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

    def chosen_split(self, root: Path, layout: Format = "llava") -> str | None:
        """The split that `load` reads; None where the benchmark has but one. Those that take what is there override it."""
        return self.split if len(self.splits) > 1 else None

    def load_source(
        self, questions: Path, images: Path, limit: int | None = None, follow_links: bool = False
    ) -> list[Item]:
        """Read the items from a source of a data set: a question file, and the folder that its images lie in.

        With `follow_links`, links below that folder may lead out of it (`data/images.py`, `safe_path`).

        Only benchmarks that can be asked like this override it; planning refuses it of others.

        Raises:
            DataError: the file or an image is missing, a line is broken, or an image lies outside the folder.
        """
        raise NotImplementedError(f"{self.name} reads its own files only")

    def prompt_at(self, item: Item, times: Callable[[], Sequence[float]]) -> str:
        """What is asked, once it is known which frames are shown: the item's prompt. Those with subtitles override it.

        Args:
            times: opens the item's videos, and says at which seconds the frames that are shown are, ascending.

        Raises:
            DataError: the benchmark needs a file that is missing.
        """
        return item.prompt

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

    def regraded(self, items: Sequence[Item], rows: Sequence[ItemScore]) -> Mapping[str, float] | None:
        """The metrics of some items from the scores that they have, for intervals; None where answers are scored anew for that.

        A judge is not asked again hundreds of times, so judged benchmarks whose metrics are no means override it.
        """
        return None

    def truth(self, item: Item) -> str:
        """The expected answer in words, for reports: the reference, or its `answer` if it is a mapping; others override it.

        A reference of another class is shown where the class says how (`__str__`); nobody wants to read its repr.
        """
        reference = item.reference.get("answer") if isinstance(item.reference, Mapping) else item.reference
        if isinstance(reference, list | tuple):
            return ", ".join(map(str, reference))
        written = isinstance(reference, str | int | float) or type(reference).__str__ is not object.__str__
        return str(reference) if written and reference is not None else ""

    def correct(self, score: float | None) -> bool | None:
        """Right or wrong, for showing: at least half of what can be had. None where there is no score, or it is a rating."""
        return None if score is None or self.top > 1 else score >= self.top / 2

    def group_of(self, item: Item) -> str:
        """What is scored together with others: `limit` keeps such questions or leaves them out as one. By default, none is."""
        return item.item_id

    def pair(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Answer]:
        """Pair the rows of an answer file (`question_id`, `text`, `prompt`) with items, by content, never by position.

        The default pairs by question id; benchmarks whose ids are not unique override it. Of an item that is answered
        twice the later row counts, as in LLaVA's scripts; the command counts such rows as `duplicate`.

        Raises:
            DataError: an answered id belongs to no item.
        """
        return pair_by_question_id(items, rows)

    def write_submission(self, items: Sequence[Item], answers: Mapping[str, Answer], path: Path) -> None:
        """Write the file that the benchmark's server takes; benchmarks with an `upload` override it.

        Raises:
            ConfigError: this benchmark has no upload format, or its server does not take these items.
            DataError: the upload needs a file that is missing.
        """
        raise ConfigError([Fault("benchmark", f"{self.name} has no upload file; it is scored locally.")])
