"""`POST /v1/chat/completions`: the reply, whole or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from tinylmm.serving.answers import Answers, Change
from tinylmm.serving.errors import ApiError
from tinylmm.serving.requests import ChatRequest
from tinylmm.version import __version__

FINGERPRINT = f"tinylmm-{__version__}"


class ChatReply:
    """What one request is replied.

    Args:
        model: the name it is told.
    """

    def __init__(self, model: str, request: ChatRequest, answers: Answers) -> None:
        self.request, self.answers = request, answers
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self) -> dict[str, Any]:
        """The reply when all answers are complete."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None if self.request.alternatives is None else {"content": choice.log_probs},
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(await self.answers.whole())
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.answers.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The reply in chunks; one that cannot be completed ends with an error, as its status was sent before."""
        for index in range(len(self.answers.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        held: dict[int, list[dict[str, Any]]] = {}
        try:
            async for change in self.answers.changes():
                known = held.pop(change.index, []) + change.log_probs
                if not change.piece and change.finish is None:  # log-probabilities wait for the text they belong to
                    held[change.index] = known
                    continue
                yield self._changed(change, known)
                if change.finish is not None and change.piece:
                    yield self._chunk(change.index, {}, change.finish)
        except ApiError as error:
            yield error.body()
            return
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.answers.usage()}

    def _changed(self, change: Change, known: list[dict[str, Any]]) -> dict[str, Any]:
        delta = {"content": change.piece} if change.piece else {}
        return self._chunk(change.index, delta, None if change.piece else change.finish, known)

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, known: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": known} if known else None,
            "finish_reason": finish,
        }
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
