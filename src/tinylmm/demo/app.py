"""The demo's application: the page, and no way out of it to other hosts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinylmm.demo.page import CSS, ESCAPE, Page
from tinylmm.demo.questions import QuestionSet
from tinylmm.serving.errors import ApiError
from tinylmm.serving.http import Gate, host_of, told
from tinylmm.serving.options import MB
from tinylmm.serving.service import Service

USER = "tinylmm"
"""Name to sign in with where a key is asked for."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
        "connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Closed:
    """Has the browser ask no host but this one, whatever stands on the page, and answers no page of another.

    Args:
        hosts: names that a page may be called by that asks; None takes any.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is not None and self.hosts is not None and host_of(urlsplit(origin).netloc) not in self.hosts:
            refusal = ApiError(403, f"pages of {origin[:80]} may not ask this server.", None, "origin_not_allowed")
            await told(refusal)(scope, receive, closed)
            return
        await self.app(scope, receive, closed)


class Left:
    """Ends what pages hold open for as long as they are shown, as if their browsers had left, once the command is to stop.

    Args:
        stopping: set when it is.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event) -> None:
        self.app, self.stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unfinished = False

        async def noted(message: Message) -> None:
            nonlocal unfinished
            unfinished = message["type"] == "http.response.start" or bool(message.get("more_body"))
            await send(message)

        async def heard() -> Message:
            waiting = asyncio.ensure_future(receive()), asyncio.ensure_future(self.stopping.wait())
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                return waiting[0].result() if waiting[0].done() else {"type": "http.disconnect"}
            finally:
                for one in waiting:
                    one.cancel()

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.app(scope, heard, noted)
        if unfinished:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_app(
    services: Sequence[Service],
    sets: Sequence[QuestionSet],
    folder: Path,
    key: str | None = None,
    hosts: tuple[str, ...] | None = None,
) -> FastAPI:
    """The demo's application; it starts and closes the services. Setting `state.stopping` ends what pages hold open.

    Args:
        sets: see `page.Page`.
        folder: where uploads and the images of held-out questions are kept; whoever made it takes it away.
        key: what users sign in with, as USER; None asks for none.
        hosts: see `serving.http.Gate`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for service in services:
            service.start()
        try:
            yield
        finally:
            for service in services:
                service.close()

    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    shown = folder / "questions"
    shown.mkdir(exist_ok=True)
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok" if all(service.worker.alive for service in services) else "failed"}

    text, code = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the reader's own machine
    gr.mount_gradio_app(
        app,
        Page(services, sets, shown).build(),
        path="/",
        footer_links=[],
        run_history=False,
        auth=None if key is None else (USER, key),
        allowed_paths=[str(shown)],
        show_error=True,
        max_file_size=int(max(service.options.body_mb for service in services) * MB),
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="gray", font=text, font_mono=code),
        css_paths=[CSS],
        head=ESCAPE,
    )
    app.add_middleware(Gate, key=None, hosts=hosts, metrics=services[0].metrics, paths=frozenset({"/", "/health"}))
    app.add_middleware(Closed, hosts=hosts)
    app.state.stopping = asyncio.Event()
    app.add_middleware(Left, stopping=app.state.stopping)
    return app
