"""The demo's page, served in this process to a test, with tiny models behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

pytest.importorskip("gradio", reason="the page is Gradio's: pip install 'tinylmm[demo]'")

from tinylmm.demo.app import make_app
from tinylmm.demo.questions import QuestionSet
from tinylmm.generation.session import load
from tinylmm.serving.http import LOOPBACK
from tinylmm.serving.options import ServeOptions
from tinylmm.serving.server import bind
from tinylmm.serving.service import Service

SAME = {"__type__": "update"}
"""Says that something is shown as before."""


@dataclass
class Showing:
    """A page that is served.

    Attributes:
        url: where.
        services: of the models behind it.
    """

    url: str
    services: list[Service]

    def wait_until_idle(self) -> None:
        """Wait until no engine has anything to do."""
        until = time.monotonic() + 120
        while any(service.worker.engine.busy for service in self.services):
            assert time.monotonic() < until, "an answer goes on"
            time.sleep(0.02)


@contextmanager
def showing(
    folder: Path, models: dict[str, Path], sets: Sequence[QuestionSet] = (), key: str | None = None
) -> Iterator[Showing]:
    """Serve a page about models, by their names, until the end."""
    options = ServeOptions(rows=4, drain_s=1)
    services = [Service(load(where, device="cpu", attention="sdpa"), name, options) for name, where in models.items()]
    taken = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        make_app(services, sets, folder, key, LOOPBACK), log_config=None, ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.02)
        yield Showing(f"http://127.0.0.1:{taken.getsockname()[1]}", services)
    finally:
        server.should_exit = True
        thread.join()


def ask_by_client(page: Showing, question: str, images: Sequence[Any], length: int) -> list[Any]:
    """Ask as a program does; what the page would show at the end.

    Args:
        images: files, or what a client says of them.
    """
    from gradio_client import Client, handle_file

    client = Client(page.url, verbose=False)
    files = [handle_file(image) if isinstance(image, Path) else image for image in images]
    job = client.submit({"text": question, "files": files}, length, 0, 1, None, api_name="/ask")
    job.result(timeout=120)
    last: list[Any] = []
    for shown in job.outputs():
        last = [new if new != SAME else old for new, old in zip(shown, last or shown, strict=True)]
    return last
