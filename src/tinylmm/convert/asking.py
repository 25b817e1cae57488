"""What two programs are asked to see whether they answer alike: questions, answers, and who is asked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinylmm.constants import IMAGE_SLOT

if TYPE_CHECKING:
    from tinylmm.models.checkpoint import LoadedModel

LIKELIEST = 20
"""At each position, the log-probabilities of so many tokens are compared: those that are our likeliest."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: the words, without image slots; the pictures stand in front of them.
        images: picture files, none, one or several.
    """

    text: str
    images: tuple[Path, ...] = ()

    @property
    def with_slots(self) -> str:
        """The words with a slot for each picture in front, as messages with parts are rendered."""
        return f"{IMAGE_SLOT}\n{self.text}" if len(self.images) == 1 else IMAGE_SLOT * len(self.images) + self.text


@dataclass(frozen=True)
class Questions:
    """What is asked, and where it comes from.

    Attributes:
        source: in words.
        left_out: what is not asked, one sentence each.
    """

    source: str
    items: tuple[Question, ...]
    left_out: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        """How many different pictures there are."""
        return len({image for item in self.items for image in item.images})


@dataclass(frozen=True)
class Answered:
    """What a program made of a question.

    Attributes:
        prompt: token ids, `IMAGE_TOKEN_ID` where a picture stands; None where the program does not tell.
        length: of the prompt in tokens.
        ids: of the greedy answer, without the end token; None where the program tells its text alone.
        text: of the answer, without white space around it.
        log_probs: behind the prompt and behind each token of OUR answer: token id -> log-probability in nats. A program that
            tells of the first position alone has one entry.
    """

    length: int
    text: str
    log_probs: tuple[Mapping[int, float], ...]
    ids: tuple[int, ...] | None = None
    prompt: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Asking:
    """What a program is given.

    Attributes:
        folder: what was exported.
        loaded: our own model, whose template and tokenizer the prompts come from.
        expected: what it answers, one entry a question.
        tokens: most new tokens of an answer.
        rows: of the vocabulary; a folder may have more, which are no tokens.
    """

    folder: Path
    loaded: LoadedModel
    questions: Sequence[Question]
    expected: Sequence[Answered]
    tokens: int
    rows: int


@dataclass(frozen=True)
class Heard:
    """What a program said, and which version of what it was."""

    answers: Sequence[Answered]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Tolerance:
    """The largest difference of log-probabilities, in nats, that counts as rounding, and why."""

    value: float
    reason: str


@dataclass(frozen=True)
class Program:
    """Who can be asked about a format's folders.

    Attributes:
        name: of the program.
        how: in what way it is asked, a sentence.
        require: raises `UserError`, with what to install, where it cannot be asked here.
        ask: asks it.
        tolerance: what counts as rounding, by the word of `--dtype`.
        not_checked: what the comparison says nothing about, one sentence each.
        squared: the program prepares pictures in a way of its own, unless they have the tower's size.
    """

    name: str
    how: str
    require: Callable[[], None]
    ask: Callable[[Asking], Heard]
    tolerance: Callable[[str], Tolerance]
    not_checked: Sequence[str] = field(default_factory=tuple)
    squared: bool = False
