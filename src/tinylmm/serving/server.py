"""A server from its start to its end: one socket, one event loop, signals that let it finish what it has begun."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tinylmm.errors import UserError
from tinylmm.serving.options import ServeOptions
from tinylmm.stop import STOP_SIGNALS

log = logging.getLogger(__name__)

HEADER_BYTES = 65536


def bind(host: str, port: int) -> socket.socket:
    """Take an address, without listening yet.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: it is not to be had.
    """
    if not 0 <= port < 1 << 16:  # it would be taken modulo that
        raise UserError(f"--port is {port}; it must be 0 (a free one) to 65535.")
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} is not to be had: {error}. Name another --host or --port.") from error
    return taken


class _Server(uvicorn.Server):
    """Ends on any signal that ends commands, once it has finished; a second one ends it at once."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._leaving = ready, leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            log.info("%s: finishing what is begun (once more to stop at once)", signal.Signals(sig).name)
        self.should_exit = True
        self._leaving()


def _is_a_fault(record: logging.LogRecord) -> bool:
    """What is given up at the end, a request or the wait for the end itself, is none, and its traceback says nothing."""
    if record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False
    return not record.getMessage().rstrip().endswith(f"{asyncio.CancelledError.__module__}.CancelledError")


def run(
    app: FastAPI,
    taken: socket.socket,
    options: ServeOptions,
    ready: Callable[[], None],
    leaving: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes, then finish the answers that were asked for, for `options.drain_s` at most.

    Args:
        ready: called when requests are taken.
        leaving: called at each signal to stop.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.drain_s)),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_a_fault)
    _Server(config, ready, leaving).run([taken])
