"""What comparing an exported folder's answers with our model's has found: kept in the folder, quoted and told. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError

CERTIFICATE = "certificate.json"
FORMAT = 1
SHOWN = 8
"""Answers that differ are listed up to so many."""


@dataclass(frozen=True)
class Differing:
    """A question that was answered otherwise; a near tie where rounding alone explains it."""

    question: str
    ours: str
    theirs: str
    near_tie: bool


@dataclass(frozen=True)
class Certificate:
    """The comparison.

    Attributes:
        exported_as: the format.
        program: who was asked, `versions` says which version.
        how: in what way.
        model: run, training stage and digest that the folder was made of, or the content of a folder from elsewhere.
        asked: where the questions come from.
        questions, pictures: how many.
        new_tokens: most of an answer.
        equal_answers: greedy answers that are the same, token by token or, where a program tells text alone, in their text.
        near_ties: others, where the two tokens that part them are as likely as each other within the tolerance.
        equal_prompts: prompts of the same tokens; of as many, where a program tells their number alone.
        distinct_answers: how many of our answers differ from each other; where they are all alike, equal ones say little.
        largest_difference: of log-probabilities, in nats, over `positions` places and our 20 likeliest tokens at each.
        tolerance: what counts as rounding, with `reason`.
        dtype: of the written weights; both sides compute in fp32 unless `reason` says otherwise.
        files: name -> SHA-256 of what was compared.
        not_checked: what this says nothing about.
        error: why the program could not be asked to the end; empty.
    """

    exported_as: str
    program: str
    how: str
    model: Mapping[str, str | None]
    asked: str
    questions: int
    pictures: int
    new_tokens: int
    tolerance: float
    reason: str
    dtype: str
    device: str
    date: str
    versions: Mapping[str, str]
    not_checked: tuple[str, ...]
    files: Mapping[str, str]
    equal_answers: int = 0
    near_ties: int = 0
    equal_prompts: int = 0
    largest_difference: float | None = None
    positions: int = 0
    distinct_answers: int = 0
    differing: tuple[Differing, ...] = field(default=())
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the folder answers as our model does."""
        near = self.largest_difference is not None and self.largest_difference <= self.tolerance
        return not self.error and near and self.equal_answers + self.near_ties == self.questions

    @property
    def sentence(self) -> str:
        """The finding in one line."""
        name = f"{self.program} {self.versions.get(self.program, '')}".strip()
        if self.error or self.largest_difference is None:
            return f"{name} was not asked to the end: {self.error}"
        ties = f" ({self.near_ties} more part at a near tie)" if self.near_ties else ""
        return (
            f"{name} gives {self.equal_answers} of {self.questions} equal answers{ties}; log-probabilities differ by "
            f"{self.largest_difference:.1e} at most (tolerance {self.tolerance:g})"
        )

    def as_json(self) -> dict[str, Any]:
        """The content of certificate.json; a difference that is no number is a word there."""
        content = {"format": FORMAT, "passed": self.passed, "sentence": self.sentence} | asdict(self)
        difference = self.largest_difference
        if difference is not None and not abs(difference) < float("inf"):
            content["largest_difference"] = str(difference)
        return content

    def write(self, folder: Path) -> None:
        """Write certificate.json into a folder."""
        text = json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / CERTIFICATE).write_text(f"{text}\n", encoding="utf-8")


class OtherAnswersError(IntegrityError):
    """A folder answers otherwise than the model it was made of; it is kept for whoever looks for the reason.

    Attributes:
        certificate: what was found.
        folder: where it lies.
    """

    def __init__(self, certificate: Certificate, folder: Path) -> None:
        wrong = [one for one in certificate.differing if not one.near_tie]
        shown = "".join(f"\n  {one.question!r}: ours {one.ours!r}, theirs {one.theirs!r}" for one in wrong[:3])
        super().__init__(
            f"--verify failed: {certificate.sentence}. What was written is kept as {folder}, with {CERTIFICATE}, and is not "
            f"to be used.{shown}"
        )
        self.certificate, self.folder = certificate, folder
