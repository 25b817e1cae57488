"""One HTTP POST with a limit on its whole time and length. It follows no redirect, and can be cut from outside."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.request
from email.message import Message
from functools import partial
from typing import Any
from urllib.parse import urlsplit

MAX_ERROR_BYTES = 2000


class RefusedError(Exception):
    """The server answers with a status that is no success.

    Attributes:
        status, reason: of the answer's first line.
        detail: the beginning of its body.
        headers: what came with it.
    """

    def __init__(self, status: int, reason: str, detail: str, headers: Message) -> None:
        super().__init__(f"HTTP {status} {reason}")
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = headers


class Transport:
    """Sends to one address.

    Args:
        url: http or https; to this machine no proxy is asked.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        handlers: list[Any] = [_NoRedirect, _Http, _Https]
        if urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's own servers
        self._opener = urllib.request.build_opener(*handlers)

    def post(self, body: bytes, headers: dict[str, str], timeout: float, max_bytes: int) -> bytes:
        """Return the reply's body.

        Args:
            timeout: seconds for all of it, from the connection to the last byte.
            max_bytes: the longest reply that is read.

        Raises:
            RefusedError: it is no success.
            OSError, http.client.HTTPException: no connection, no whole reply, or not in time (TimeoutError).
            ValueError: the reply is longer.
        """
        request = _Request(self.url, body, headers)
        timer = threading.Timer(timeout, request.cut)
        timer.daemon = True
        timer.start()
        try:
            received = self._read(request, timeout, max_bytes)
        except (OSError, http.client.HTTPException):
            if not request.was_cut:
                raise
        finally:
            timer.cancel()
        if request.was_cut:
            raise TimeoutError(f"no complete reply within {timeout:g} s")
        return received

    def _read(self, request: _Request, timeout: float, max_bytes: int) -> bytes:
        received = bytearray()
        try:
            with self._opener.open(request, timeout=timeout) as response:
                while chunk := response.read1(65536):
                    received += chunk
                    if len(received) > max_bytes:
                        raise ValueError(f"the reply is longer than {max_bytes:,} bytes")
        except urllib.error.HTTPError as error:
            detail = b""
            with contextlib.closing(error), contextlib.suppress(OSError, http.client.HTTPException):
                detail = error.read(MAX_ERROR_BYTES)
            raise RefusedError(error.code, error.reason, detail.decode("utf-8", "replace"), error.headers) from None
        return bytes(received)


class _Request(urllib.request.Request):
    """A request that another thread can cut: a socket's own timeout starts anew with every byte."""

    def __init__(self, url: str, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(url, body, headers, method="POST")
        self.was_cut = False
        self._connections: list[http.client.HTTPConnection] = []
        self._sockets: list[socket.socket] = []

    def connection(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
        """Return a new connection; its socket is remembered, as urllib forgets it when the reply begins."""
        made = kind(host, **options)
        self._connections.append(made)
        connect = made.connect

        def remembered() -> None:
            connect()
            self._sockets.append(made.sock)

        made.connect = remembered  # type: ignore[method-assign]
        return made

    def cut(self) -> None:
        """End the request: whoever reads from it meets the end of the reply."""
        self.was_cut = True
        for one in {*self._sockets, *(connection.sock for connection in self._connections)} - {None}:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(one, socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(partial(request.connection, http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: Any) -> Any:
        return self.do_open(partial(request.connection, http.client.HTTPSConnection), request)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to wherever the answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None
