"""`POST /v1/responses`: OpenAI's newer form, for requests that bring the whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from itertools import count
from typing import Any, ClassVar

from pydantic import Field

from tinylmm.serving.answers import Answers
from tinylmm.serving.errors import ApiError, wrong
from tinylmm.serving.messages import Conversation, read_messages
from tinylmm.serving.requests import NEUTRAL, AnswerFields


class ResponsesRequest(AnswerFields):
    """What a request may say. Nothing is stored, so there is no earlier response to go on from."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "include": ([],),
        "text": ({"format": {"type": "text"}}, {}),
        "reasoning": ({},),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)

    def limit(self, default: int) -> int:
        """Most new tokens."""
        return self.max_output_tokens or default

    def conversation(self) -> Conversation:
        """What was said.

        Raises:
            ApiError: see `read_messages`; or an item is no message.
        """
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for number, item in enumerate(items):
            if item.get("type", "message") != "message":
                raise wrong(f"input[{number}] is a {str(item['type'])[:40]!r}; messages alone are supported.", "input")
        told = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return read_messages([*told, *items], "input")


class ResponsesReply:
    """What one request is replied.

    Args:
        model: the name it is told.
    """

    def __init__(self, model: str, request: ResponsesRequest, answers: Answers) -> None:
        self.request, self.answers = request, answers
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": False,
            "temperature": request.temperature or 0.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "store": False,
        }
        self._item = f"msg_{secrets.token_hex(12)}"

    async def whole(self) -> dict[str, Any]:
        """The reply when the answer is complete."""
        await self.answers.whole()
        return self._complete()

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The reply as named events."""
        number = count()

        def event(name: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
            return name, {"type": name, "sequence_number": next(number), **fields}

        place = {"output_index": 0, "item_id": self._item, "content_index": 0}
        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield event("response.created", {"response": begun})
        yield event("response.in_progress", {"response": begun})
        yield event("response.output_item.added", {"output_index": 0, "item": self._message("in_progress", [])})
        yield event("response.content_part.added", {**place, "part": _part("")})
        try:
            async for change in self.answers.changes():
                if change.piece:
                    yield event("response.output_text.delta", {**place, "delta": change.piece, "logprobs": []})
        except ApiError as error:
            yield event("error", {"code": error.code, "message": error.message, "param": error.param})
            return
        complete = self._complete()
        text = self.answers.choices[0].text
        yield event("response.output_text.done", {**place, "text": text, "logprobs": []})
        yield event("response.content_part.done", {**place, "part": _part(text)})
        yield event("response.output_item.done", {"output_index": 0, "item": complete["output"][0]})
        yield event(f"response.{complete['status']}", {"response": complete})

    def _complete(self) -> dict[str, Any]:
        [choice], usage = self.answers.choices, self.answers.usage()
        cut = choice.finish == "length"
        status = "incomplete" if cut else "completed"
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(status, [_part(choice.text)])],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
