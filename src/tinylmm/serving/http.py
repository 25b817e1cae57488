"""What all requests have in common: who may ask, how a body is read, what happens when a client leaves."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinylmm.serving.errors import ApiError
from tinylmm.serving.metrics import Metrics
from tinylmm.serving.options import MB, ServeOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

OPEN = ("/health",)
"""Paths that need no key."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DRAINED = 4
"""Of a request that is too large, so many times the limit are still read and dropped before it is told so: who sends a whole
request before reading would else find the connection reset, and never see the reply (RFC 9112, section 9.6)."""


class Gate:
    """Lets requests in, and counts how they end.

    Args:
        key: what they must bring as `Authorization: Bearer KEY`; None asks for none.
        hosts: names that `Host` may have; None takes any. On the loopback this keeps web pages out whose name was made to
            lead to this machine (DNS rebinding).
        paths: those that are counted by name.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: tuple[str, ...] | None, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self.app, self.key, self.hosts, self.metrics, self.paths = app, key, hosts, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        error = self._refusal({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}, scope["path"])
        if error is not None:
            await told(error)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _refusal(self, headers: Mapping[str, str], path: str) -> ApiError | None:
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            text = f"this server answers to {', '.join(self.hosts)} alone; --allow-host NAME adds a name."
            return ApiError(403, text, None, "host_not_allowed")
        if self.key is None or path in OPEN:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            return None
        text = "the API key is missing or wrong. Send `Authorization: Bearer KEY`."
        return ApiError(401, text, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


def host_of(header: str) -> str:
    """A `Host` header's name without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def told(error: ApiError) -> JSONResponse:
    """An error as a reply."""
    return JSONResponse(error.body(), error.status, error.headers)


async def read_body(request: Request, options: ServeOptions) -> bytes:
    """Read a JSON request's body, within its limits of size and time.

    Raises:
        ApiError: it is of another type, too large, or too slow.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = f"the content type is '{kind[:60]}'; send `Content-Type: application/json`."
        raise ApiError(415, text, None, "unsupported_content_type")
    most = int(options.body_mb * MB)
    declared = request.headers.get("content-length", "0")
    fits = not declared.isdigit() or int(declared) <= most
    chunks, size = [], 0
    try:
        async with asyncio.timeout(options.read_s):
            async for chunk in request.stream():
                size += len(chunk)
                if fits and size <= most:
                    chunks.append(chunk)
                elif size > DRAINED * most:
                    break
    except TimeoutError:
        if fits and size <= most:
            text = f"the request took more than {options.read_s:g} s to arrive."
            raise ApiError(408, text, None, "request_timeout", {"Connection": "close"}) from None
    if not fits or size > most:
        raise _too_large(options)
    return b"".join(chunks)


def _too_large(options: ServeOptions) -> ApiError:
    text = f"the request is larger than {options.body_mb:g} MB. Send smaller images, or fewer."
    return ApiError(413, text, None, "request_too_large", {"Connection": "close"})


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client whose body was read, and give it up when the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: what to send: a JSON object, or an event's name and its object.
        done: called when it is over, however it ends, with whether all was sent.
        send_s: a client that does not take a piece in so many seconds is let go, as it keeps others from their turn.
        last: sent at the end of a stream that ends well, as it is.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any] | tuple[str, dict[str, Any]]],
        done: Callable[[bool], None],
        send_s: float,
        last: str | None = None,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(events, last), headers=headers, media_type="text/event-stream")
        self._done, self._send_s, self._told = done, send_s, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timely(message: Message) -> None:
            async with asyncio.timeout(self._send_s):
                await send(message)

        try:
            await super().__call__(scope, receive, timely)
        except TimeoutError:
            log.info("a client did not take its answer")
        finally:
            self._done(self._told)

    async def _lines(self, events: Any, last: str | None) -> AsyncIterator[str]:
        async with aclosing(events):
            async for event in events:
                name, body = event if isinstance(event, tuple) else (None, event)
                head = "" if name is None else f"event: {name}\n"
                yield f"{head}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
        if last is not None:
            yield f"data: {last}\n\n"
        self._told = True
