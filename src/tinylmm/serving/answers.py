"""The answers to one request as they come: text, log-probabilities, why each ended, and what it all took."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tinylmm.constants import Extent
from tinylmm.generation.choose import LogProbs, Sampling
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.generation.questions import End, Event, Question, Token
from tinylmm.generation.text import Pieces
from tinylmm.serving.errors import ApiError
from tinylmm.serving.worker import ClosedError, EngineWorker

log = logging.getLogger(__name__)

LEAST_LOG_PROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True)
class Asked:
    """A request's question, ready for the engine.

    Attributes:
        pixels, sizes: of the prompt's images, by key.
        image_tokens: how many of the prompt's tokens are images'.
    """

    prompt: Prompt
    pixels: dict[str, Tensor]
    sizes: dict[str, Extent]
    image_tokens: int


@dataclass
class Choice:
    """One answer so far.

    Attributes:
        text: told so far.
        log_probs: of its tokens, where they are wanted, in OpenAI's form.
        finish: why it ended, None before that.
        tokens: new tokens.
    """

    pieces: Pieces
    text: str = ""
    log_probs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Change:
    """What came to one answer: a piece of text, log-probabilities of tokens; `finish` with the last."""

    index: int
    piece: str
    log_probs: list[dict[str, Any]]
    finish: str | None


class Answers:
    """Asks the engine for the answers to one request, and follows them in the event loop that made this.

    Args:
        samplings: one for each answer.
        stops: texts that end an answer.
        alternatives: as `Question.alternatives`.

    Attributes:
        first: when the first token was there (monotonic seconds).
    """

    def __init__(
        self,
        worker: EngineWorker,
        prompts: PromptMaker,
        asked: Asked,
        samplings: Sequence[Sampling],
        stops: Sequence[str] = (),
        alternatives: int | None = None,
    ) -> None:
        self.asked, self._prompts = asked, prompts
        self.first: float | None = None
        self.choices = [Choice(Pieces(prompts.text, stops)) for _ in samplings]
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._questions = [
            Question(asked.prompt, sampling, asked.pixels.__getitem__, asked.sizes, self._teller(index), alternatives)
            for index, sampling in enumerate(samplings)
        ]
        for question in self._questions:
            worker.ask(question)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for question in self._questions:
            question.cancelled = True

    async def changes(self) -> AsyncIterator[Change]:
        """Yield what comes, until all answers are complete.

        Raises:
            ApiError: the engine failed; what with, the log says.
        """
        try:
            while any(choice.finish is None for choice in self.choices):
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise failure(event) from event
                if (change := self._take(index, event)) is not None:
                    yield change
        finally:
            self.cancel()

    async def whole(self) -> list[Choice]:
        """Wait for all answers.

        Raises:
            ApiError: see `changes`.
        """
        async for _ in self.changes():
            pass
        return self.choices

    def usage(self) -> dict[str, Any]:
        """What the request took, in OpenAI's form, with the images' tokens."""
        prompt, new = len(self.asked.prompt.ids), sum(choice.tokens for choice in self.choices)
        cached = max(question.cached or 0 for question in self._questions)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": self.asked.image_tokens},
        }

    def _teller(self, index: int) -> Callable[[Event], None]:
        return lambda event: _tell(self._loop, self._events, (index, event))

    def _take(self, index: int, event: Token | End) -> Change | None:
        choice = self.choices[index]
        if choice.finish is not None:  # it came to a stop before the engine heard of it
            return None
        before, known = len(choice.text), []
        if isinstance(event, Token):
            self.first = self.first or time.monotonic()
            choice.tokens += 1
            choice.text += choice.pieces.add(event.id)
            if event.log_probs is not None and not choice.pieces.stopped:
                known = [self._told(event.id, event.log_probs)]
                choice.log_probs += known
            if choice.pieces.stopped:
                choice.finish = "stop"
                self._questions[index].cancelled = True
        else:
            choice.text += choice.pieces.finish()
            choice.finish = event.reason
        return Change(index, choice.text[before:], known, choice.finish)

    def _told(self, token: int, known: LogProbs) -> dict[str, Any]:
        return {**self._entry(token, known.chosen), "top_logprobs": [self._entry(*pair) for pair in known.top]}

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = str(self._prompts.tokenizer.decode([token]))
        whole = "\ufffd" not in text  # a part of a character has no text of its own
        return {
            "token": text,
            "logprob": max(log_prob, LEAST_LOG_PROB),
            "bytes": list(text.encode()) if whole else None,
        }


def failure(error: Exception) -> ApiError:
    """What a client is told of an answer that failed; what it was stands in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is stopping. Ask again later.", None, "server_stopping", {"Retry-After": "10"})
    if isinstance(error, FloatingPointError):
        return ApiError(500, f"{error}; other questions may work.", None, "not_finite")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server could not answer; its log says why.", None, "internal_error")


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], item: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody waits
        loop.call_soon_threadsafe(events.put_nowait, item)
