"""A conversation with one model, or with several at once: the same questions, and what each of them said. Knows no page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinylmm.errors import UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.inputs import placed
from tinylmm.serving.answers import Answers
from tinylmm.serving.errors import ApiError
from tinylmm.serving.messages import Conversation, Said
from tinylmm.serving.service import Service

PACE = 0.08
"""Seconds between two looks at answers that grow: a page that is drawn anew for every token is slower than the model."""

Ending = Literal["stop", "length", "stopped", "failed"]


@dataclass
class Reply:
    """What one model said to one question, and what it took.

    Attributes:
        ending: why it ended: as in `questions.End`, or by the user's stop, or by a fault; None as long as it goes on.
        prompt_tokens: tokens of the whole conversation up to and with the question, images' counted in.
        image_tokens: those of images.
        cached_tokens: those that were not computed anew; None until it is known.
        first: seconds to the first token, None before it.
        seconds: to the last token so far.
        problem: what went wrong, in words.
    """

    prompt_tokens: int
    image_tokens: int
    text: str = ""
    tokens: int = 0
    ending: Ending | None = None
    cached_tokens: int | None = None
    first: float | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens a second behind the first one, which waits for the prompt; None where there is nothing to measure."""
        if self.first is None or self.tokens < 2 or self.seconds <= self.first:
            return None
        return (self.tokens - 1) / (self.seconds - self.first)


@dataclass
class Turn:
    """A question with its images' files, and one reply a model.

    Attributes:
        truth: the right answer, where the question comes from an evaluation.
        recorded: what each model said there; None where it was not asked.
    """

    question: str
    images: tuple[Path, ...]
    replies: list[Reply]
    truth: str | None = None
    recorded: tuple[str | None, ...] = ()


@dataclass
class Talk:
    """All that was said since the conversation began; what the page shows is what the models are told."""

    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    """Whether a question is being answered."""
    _running: list[asyncio.Task[None]] = field(default_factory=list)

    def stop(self) -> None:
        """End the answers that are being written, as far as they are."""
        for task in self._running:
            task.cancel()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.turns.clear()

    async def ask(
        self,
        services: Sequence[Service],
        question: str,
        images: Sequence[Path],
        sampling: Sampling,
        truth: str | None = None,
        recorded: tuple[str | None, ...] = (),
    ) -> AsyncIterator[None]:
        """Have every model answer, and yield whenever there may be something new in the last of `turns`.

        Nobody is asked where one cannot be: then this raises before it yields, and nothing is kept of the question. The answers
        end when this iterator is closed.

        Raises:
            ApiError: an image cannot be read or is too large, the conversation is too long, or too much is waiting.
            UserError: there is nothing to ask, or an answer is still being written.
        """
        if self.busy:
            raise UserError("The answer before is still being written. Stop it first.")
        if not question.strip() and not images:
            raise UserError("Type a question, or add an image.")
        self.busy = True
        try:
            with ExitStack() as held:
                for service in services:
                    held.enter_context(service.places(1))
                turn = await self._begin(services, question, tuple(images), sampling)
                turn.truth, turn.recorded = truth, recorded
                async for _ in self._watched(turn):
                    yield
        finally:
            self.busy = False
        yield

    async def _begin(
        self, services: Sequence[Service], question: str, images: tuple[Path, ...], sampling: Sampling
    ) -> Turn:
        """Have the answers to a question begun."""
        began = time.monotonic()
        files = {path: _content(path) for path in {*images, *(path for turn in self.turns for path in turn.images)}}
        told = [self._conversation(number, question, images, files) for number in range(len(services))]
        asked = [await service.prepare(one) for service, one in zip(services, told, strict=True)]
        turn = Turn(question, images, [Reply(len(one.prompt.ids), one.image_tokens) for one in asked])
        answers = [service.ask(one, [sampling]) for service, one in zip(services, asked, strict=True)]
        self._running = [
            asyncio.create_task(_follow(answer, reply, began))
            for answer, reply in zip(answers, turn.replies, strict=True)
        ]
        self.turns.append(turn)
        return turn

    async def _watched(self, turn: Turn) -> AsyncIterator[None]:
        """Look at answers until they are complete; they end where nobody looks any more."""
        pending = set(self._running)
        try:
            while pending:
                _, pending = await asyncio.wait(pending, timeout=PACE)
                yield
        finally:
            self.stop()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._running = []
            if turn in self.turns and not any(reply.text or reply.ending == "stop" for reply in turn.replies):
                self.turns.remove(turn)  # nothing was said: the question may be asked again

    def _conversation(
        self, model: int, question: str, images: Sequence[Path], files: dict[Path, bytes]
    ) -> Conversation:
        """What one model is told: its own answers, and everybody's questions."""
        questions = [(turn.question, turn.images) for turn in self.turns] + [(question, tuple(images))]
        return Conversation(
            None,
            tuple(
                Said(placed([*[None] * len(shown), text]), tuple(files[path] for path in shown))
                for text, shown in questions
            ),
            tuple(turn.replies[model].text for turn in self.turns),
        )


def _content(path: Path) -> bytes:
    """Raises: UserError: the file is gone, as whoever cleans temporary folders may have it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"an image of this conversation is no longer there ({error.strerror}). Begin anew, and upload it again."
        ) from error


async def _follow(answers: Answers, reply: Reply, began: float) -> None:
    """Write an answer down as it comes."""
    [choice] = answers.choices
    try:
        async for _ in answers.changes():
            now = time.monotonic()
            reply.text, reply.tokens = choice.text, choice.tokens
            reply.cached_tokens = answers.usage()["prompt_tokens_details"]["cached_tokens"]
            if choice.tokens:
                reply.first = reply.first if reply.first is not None else now - began
                reply.seconds = now - began
        reply.ending = "length" if choice.finish == "length" else "stop"
    except asyncio.CancelledError:
        reply.ending = "stopped"
    except ApiError as error:
        reply.ending, reply.problem = "failed", error.message
    finally:
        answers.cancel()
