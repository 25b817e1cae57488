"""Which token comes next: the likeliest or a draw, and whether rounding alone could have made it another.

Shapes: B rows, V the vocabulary.

What a row says must not depend on its batch. The same row gives logits that differ in the last bits when it is computed
beside others, behind padding, or over a prefix computed before. The choice is the same all the same, unless two tokens are
nearly tied; such a choice is reported as a doubt, and the engine settles the row alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinylmm.errors import UserError, suggestion

TIE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""A lead over the second best token below this share of the largest logit is a near-tie. Rounding in fp32 was seen to move
logits by 1e-6 of it. Narrower types have no entry: their rounding is as large as many an honest lead."""


@dataclass(frozen=True)
class LogProbs:
    """How likely a token was, in nats, before temperature and the like, and which ones were the likeliest."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def log_probs(logits: Tensor, token: int, top: int) -> LogProbs:
    """Of a chosen token and of the `top` likeliest, from logits (V,)."""
    all_of_them = logits.float().log_softmax(-1)
    best = all_of_them.topk(min(top, len(all_of_them)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return LogProbs(float(all_of_them[token]), tuple(pairs))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: an answer's length at most.
        temperature: 0 is greedy (the default); above 0 tokens are drawn, and the fields below count.
        top_p: draw from the smallest set of tokens with this much probability.
        top_k: draw from this many tokens at most; 0 for all.
        repetition_penalty: divides the logits of tokens in the answer so far; 1 leaves them. Also counts when greedy.
        seed: of the draws; every row of a batch has its own generator, so a batch draws what single calls draw.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (fine, allowed) in ranges.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """Return the settings that options of `chat` name.

        Raises:
            UserError: there is no such option, or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                hint = suggestion(name, known)
                raise UserError(f"there is no option '{name}'. {hint} Options: {', '.join(known)}.".replace("  ", " "))
        return cls(**options)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is chosen, by the logits as they are."""
        return not self.temperature and self.repetition_penalty == 1

    def processors(self) -> LogitsProcessorList:
        """transformers' processors for these settings, in its order; they refuse whole numbers."""
        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
            found += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            found += [TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else []
        return LogitsProcessorList(found)


class Chooser:
    """Chooses tokens for the rows of one batch, step by step.

    Args:
        rows: how many there are; each has a generator of its own, seeded alike.
        doubts: whether near-ties are reported. A row that is decoded alone has none: what it says is the definition.
    """

    def __init__(self, sampling: Sampling, rows: int, device: torch.device, doubts: bool = True) -> None:
        self._processors = sampling.processors()
        self._penalises = sampling.repetition_penalty != 1
        self._doubts = doubts
        penalty = sampling.repetition_penalty
        # By how much the processors stretch a logit, and with it its rounding.
        self._stretch = max(penalty, 1 / penalty) / (sampling.temperature or 1.0)
        drawn = rows if sampling.temperature else 0
        self._generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in range(drawn)]

    def __call__(self, logits: Tensor, rows: Sequence[int], said: Sequence[Sequence[int]]) -> tuple[Tensor, list[bool]]:
        """Return a token for each line of logits, and whether it is in doubt (never, in types without an entry in TIE).

        Args:
            logits: (B, V).
            rows: which row of the batch each line is; -1 where that row has ended, and what is chosen does not matter.
            said: the answer so far of every row of the batch.

        Raises:
            FloatingPointError: a line's best logit is not a number; nothing sensible can follow.
        """
        scores = logits.float()
        if self._processors:
            scores = self._processors(self._answers(rows, said, logits.device), scores)
        best = scores.topk(2, dim=-1)
        tokens, values = best.indices[:, 0], best.values
        # Exact ties are common in narrow types: the first of them is chosen, as transformers' greedy search does.
        same = values[:, 0] == values[:, 1]
        finite, tied = torch.stack([torch.isfinite(values[:, 0]).all(), same.any()]).tolist()
        if tied:
            tokens = torch.where(same, scores.argmax(dim=-1), tokens)
        if not finite:
            raise FloatingPointError(
                "the model gives logits that are not finite: its weights are damaged, or overflow in this precision"
            )
        if self._generators:
            best = self._races(scores, rows).topk(2, dim=-1)
            tokens, values = best.indices[:, 0], best.values.log()
        share = TIE.get(logits.dtype) if self._doubts else None
        if share is None:
            return tokens, [False] * len(logits)
        largest = logits.abs().clamp(max=1e4).amax(dim=-1)  # a forbidden token's -inf is no scale
        return tokens, (values[:, 0] - values[:, 1] <= share * self._stretch * largest).tolist()

    def _answers(self, rows: Sequence[int], said: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """(B, T) ids said so far: all rows that go on have said equally many."""
        if not self._penalises:
            return torch.empty(len(rows), 0, dtype=torch.long, device=device)
        length = max(len(said[row]) for row in rows if row >= 0)
        lines = [list(said[row]) if row >= 0 else [0] * length for row in rows]
        return torch.tensor(lines, dtype=torch.long, device=device).reshape(len(rows), length)

    def _races(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """(B, V) probabilities over exponential noise: the largest is a draw, and `torch.multinomial` draws just so.

        Unlike there, the runner-up is seen too, and with it how near the draw was.
        """
        chances = scores.softmax(-1)
        noise = torch.ones_like(chances)
        for line, row in zip(noise, rows, strict=True):
            if row >= 0:
                line.exponential_(generator=self._generators[row])
        return chances / noise
