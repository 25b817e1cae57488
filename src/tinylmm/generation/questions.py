"""Questions that wait for a continuous engine's answer, and what comes back of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tinylmm.constants import Extent
from tinylmm.generation.choose import Chooser, LogProbs, Sampling
from tinylmm.generation.decode import Continued
from tinylmm.generation.prefixes import Symbol
from tinylmm.generation.prompts import Prompt

AHEAD = 256
"""Tokens of an answer that room is kept for when it is taken in; few answers are as long as their limit."""


@dataclass(frozen=True)
class Token:
    """The next token of an answer."""

    id: int
    log_probs: LogProbs | None


@dataclass(frozen=True)
class End:
    """An answer is complete: `stop` by an end token, `length` by its limit."""

    reason: Literal["stop", "length"]


Event = Token | End | Exception


@dataclass(eq=False)
class Question:
    """One answer that somebody waits for.

    Args:
        load: key of one of the prompt's images -> (3, H, W), normalised for the tower; of tiles or frames (T, 3, H, W).
        sizes: key -> width and height in pixels, of a clip how many frames it has too.
        emit: called from the engine's thread with every event; the last is an End or an Exception.
        alternatives: log-probabilities of so many likeliest tokens are told with each; None for none at all.

    Attributes:
        cancelled: set it when nobody waits any more.
        cached: prompt tokens that were not computed anew; None until the question's turn.
    """

    prompt: Prompt
    sampling: Sampling
    load: Callable[[str], Tensor]
    sizes: dict[str, Extent]
    emit: Callable[[Event], None]
    alternatives: int | None = None
    cancelled: bool = False
    cached: int | None = None
    ids: list[int] = field(default_factory=list)
    turn: int = 0
    """The how-manieth it was to be taken in."""
    symbols: tuple[Symbol, ...] = ()
    """The prompt's ids, with the key of its image in the place of each image token."""
    alone: Iterator[Continued] | None = None
    """Its answer by `decode_alone`, as far as that was asked."""
    own: Chooser | None = None
    """Draws, or counts what was said; None where the shared greedy choice will do."""

    @property
    def limit(self) -> int:
        """Most new tokens."""
        most = self.sampling.max_new_tokens
        return most if self.prompt.limit is None else min(most, self.prompt.limit)

    @property
    def cost(self) -> int:
        """Tokens that it may take in a cache."""
        return len(self.prompt.ids) + self.limit

    @property
    def known(self) -> tuple[Symbol, ...]:
        """What there is of it so far, prompt and answer."""
        return (*self.symbols, *self.ids)

    @property
    def room(self) -> int:
        """Tokens of a cache that are kept for it at present."""
        return len(self.symbols) + min(self.limit, len(self.ids) + AHEAD)
