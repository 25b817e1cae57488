"""The routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tinylmm.serving.answers import Answers, failure
from tinylmm.serving.chat import ChatReply
from tinylmm.serving.errors import ApiError
from tinylmm.serving.http import EventStream, Gate, attended, read_body, told
from tinylmm.serving.messages import Conversation, read_messages
from tinylmm.serving.requests import AnswerFields, read, read_chat
from tinylmm.serving.responses import ResponsesReply, ResponsesRequest
from tinylmm.serving.service import Service
from tinylmm.serving.worker import ClosedError

CLIENT_GONE = 499
"""Status of a reply that nobody reads, as nginx counts it."""


def make_app(service: Service, key: str | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The server's application; it starts and closes the service.

    Args:
        key, hosts: see `http.Gate`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    # no page of documentation: it would load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    _add_errors(app, service)
    _add_models(app, service)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, service.options)
        return await attended(request, _chat(service, body))

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body = await read_body(request, service.options)
        return await attended(request, _responses(service, body))

    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Gate, key=key, hosts=hosts, metrics=service.metrics, paths=paths)
    return app


async def _chat(service: Service, body: bytes) -> Response:
    asked = read_chat(body, service.options.max_choices)
    check_model(service, asked)
    conversation = read_messages(asked.messages)
    with ExitStack() as held:
        answers = await _answers(service, asked, conversation, held, asked.n or 1, asked.stops, asked.alternatives)
        reply = ChatReply(service.name, asked, answers)
        if not asked.stream:
            return JSONResponse(await reply.whole())
        return _stream(service, reply.chunks(), held.pop_all(), "[DONE]")


async def _responses(service: Service, body: bytes) -> Response:
    asked = read(ResponsesRequest, body)
    check_model(service, asked)
    conversation = asked.conversation()
    with ExitStack() as held:
        reply = ResponsesReply(service.name, asked, await _answers(service, asked, conversation, held))
        if not asked.stream:
            return JSONResponse(await reply.whole())
        return _stream(service, reply.events(), held.pop_all())


def _stream(service: Service, events: AsyncIterator[Any], held: ExitStack, last: str | None = None) -> EventStream:
    def done(told: bool) -> None:
        held.close()
        if not told:
            service.metrics.gone.inc()

    return EventStream(events, done, service.options.read_s, last)


async def _answers(
    service: Service,
    asked: AnswerFields,
    conversation: Conversation,
    held: ExitStack,
    choices: int = 1,
    stops: Sequence[str] = (),
    alternatives: int | None = None,
) -> Answers:
    """Have a request answered; what it holds until it is over is let go with `held`."""
    began = time.monotonic()
    held.enter_context(service.places(choices))
    prepared = await service.prepare(conversation, asked.frames)
    samplings = [asked.sampling(service.options.max_new_tokens, choice) for choice in range(choices)]
    answers = service.ask(prepared, samplings, stops, alternatives)
    held.callback(answers.cancel)
    held.callback(lambda: service.metrics.answered(began, answers.first))
    return answers


def check_model(service: Service, asked: AnswerFields) -> None:
    """Refuse a request to another model.

    Raises:
        ApiError: it names one.
    """
    if asked.model not in (None, service.name):
        text = f"there is no model '{str(asked.model)[:80]}' here; this server has '{service.name}'."
        raise ApiError(404, text, "model", "model_not_found")


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return told(error)

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        service.metrics.gone.inc()
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        here = "/v1/chat/completions, /v1/responses, /v1/models, /health and /metrics"
        text = f"{request.method} {request.url.path[:80]}: {error.detail}. This server has {here}."
        headers = dict(error.headers) if error.headers else None
        return told(ApiError(error.status_code, text, None, "unknown_url", headers))

    for kind in (ClosedError, FloatingPointError, Exception):

        @app.exception_handler(kind)
        async def failed(request: Request, error: Exception) -> Response:
            return told(failure(error))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(service, AnswerFields(model=name))
        return _model(service)

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.began, "owned_by": "tinylmm"}
