"""Images and videos by http, from hosts that the server was told and no others, whatever a name or a redirect leads to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2
from httpcore2 import AsyncNetworkBackend, AsyncNetworkStream

from tinylmm.errors import UserError
from tinylmm.serving.errors import ApiError, wrong
from tinylmm.serving.media import Media, RemoteFile, VideoFile
from tinylmm.serving.messages import Conversation
from tinylmm.version import __version__

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
CONNECTIONS = 32
OPAQUE = ("application/octet-stream", "binary/octet-stream")
"""Types with which file stores send what they know nothing of."""
FAILED = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError)


class RefusedError(Exception):
    """An address that is not to be asked, or a reply that is not to be taken; the message says which."""


@dataclass(frozen=True)
class ImageHosts:
    """Hosts that images may come from.

    Attributes:
        named: host and port; None stands for the scheme's own port.
    """

    named: frozenset[tuple[str, int | None]]

    @classmethod
    def of(cls, words: Iterable[str]) -> ImageHosts:
        """Read HOST or HOST:PORT as they are given.

        Raises:
            UserError: one is something else.
        """
        return cls(frozenset(map(_host_and_port, words)))

    def allow(self, host: str, port: int, scheme: str) -> bool:
        """Whether a host may be asked at this port."""
        return (host, port) in self.named or (port == PORTS[scheme] and (host, None) in self.named)

    def reach(self, host: str, address: str) -> bool:
        """Whether a host that may be asked may be asked at this address: a public one, or one that was named itself.

        A public name that was made to lead into this network would else open it (server-side request forgery).
        """
        given = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(given, "ipv4_mapped", None) or given
        if found.is_global and not found.is_multicast:
            return True
        if host == "localhost" and found.is_loopback:
            return True
        return str(found) in {name for name, _ in self.named}

    def __str__(self) -> str:
        return ", ".join(sorted(_shown(host, port) for host, port in self.named))


def _host_and_port(word: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{word}")
        host, port = _name(parts), parts.port
        rest = parts.path or parts.query or parts.fragment or parts.username or "*" in word or " " in word
    except ValueError:
        host, port, rest = "", None, True
    if not host or rest or not host.isascii():
        raise UserError(
            f"--allow-images-from is '{word}'; it must be the exact name or address of a host, as images.example.org, "
            "127.0.0.1:9000 or [::1]: no scheme, no path and no pattern. Repeat the option for each host."
        )
    return host, port


def _name(parts: SplitResult) -> str:
    return (parts.hostname or "").removesuffix(".")


def _shown(host: str, port: int | None) -> str:
    bare = f"[{host}]" if ":" in host else host
    return bare if port is None else f"{bare}:{port}"


class Fetcher:
    """Fetches images and videos for requests, all in one event loop.

    Args:
        hosts: those that are asked; none means that nothing is fetched.
        seconds: that a file may take from the first lookup to its last byte, redirects counted in.
        most: bytes of one request's files together.
    """

    def __init__(self, hosts: Sequence[str], seconds: float, most: int) -> None:
        self.hosts, self.seconds, self.most = ImageHosts.of(hosts), seconds, most
        # No connection is kept, so that nothing is left to close; proxies of the environment are not asked either.
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=CONNECTIONS, max_keepalive_connections=0, network_backend=_CheckedBackend(self.hosts)
        )

    async def files(self, conversation: Conversation) -> list[list[Media]]:
        """The contents of each question's images and videos, those that were named by address fetched.

        Raises:
            ApiError: one is not to be had, is no image or no video, or may not be fetched.
        """
        asked = [image for said in conversation.questions for image in said.images]
        remote = {(image.url, image.what): image for image in asked if isinstance(image, RemoteFile)}
        budget = _Budget(self.most)
        tasks = {name: asyncio.ensure_future(self._one(image, budget)) for name, image in remote.items()}
        try:
            await asyncio.gather(*tasks.values())
        finally:  # also where one is refused, or the client leaves
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        found = {name: _held(task.result(), name[1]) for name, task in tasks.items()}
        return [
            [found[image.url, image.what] if isinstance(image, RemoteFile) else image for image in said.images]
            for said in conversation.questions
        ]

    async def _one(self, image: RemoteFile, budget: _Budget) -> bytes:
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(image, budget)
        except TimeoutError:
            raise _refusal(image, f"took more than {self.seconds:g} s to fetch. Send the file's content.") from None
        except RefusedError as error:
            raise _refusal(image, str(error)) from None
        except FAILED as error:
            raise _refusal(image, f"could not be fetched ({str(error) or type(error).__name__}).") from None

    async def _follow(self, image: RemoteFile, budget: _Budget) -> bytes:
        url = image.url
        for _ in range(REDIRECTS + 1):
            parts, target = self._checked(url)
            headers = [
                ("Host", parts.netloc),
                ("Accept", f"{image.what}/*"),
                ("Accept-Encoding", "identity"),  # what unpacks to more than was counted never comes in
                ("User-Agent", f"tinylmm/{__version__}"),
            ]
            async with self._pool.stream("GET", target, headers=headers) as reply:
                fields = {name.lower(): value.decode("latin-1") for name, value in reply.headers}
                if reply.status in (301, 302, 303, 307, 308) and b"location" in fields:
                    url = urljoin(url, fields[b"location"])
                    continue
                return await _content(reply, fields, budget, image.what)
        raise RefusedError(f"leads on more than {REDIRECTS} times.")

    def _checked(self, url: str) -> tuple[SplitResult, httpcore2.URL]:
        """A URL's parts and what is asked for, made of the very parts that were checked."""
        if any(not "!" <= letter <= "~" for letter in url):
            raise RefusedError("has letters that a URL must encode (%20 for a space).")
        try:
            parts = urlsplit(url)
            host, given = _name(parts), parts.port
        except ValueError as error:
            raise RefusedError(f"is no URL ({error}).") from None
        if parts.scheme not in PORTS or not host:
            raise RefusedError(f"leads to {url[:80]!r}; only http and https are fetched.")
        if parts.username is not None or parts.password is not None:
            raise RefusedError("brings a user's name; that is not sent.")
        port = given or PORTS[parts.scheme]
        if not self.hosts.named:
            raise RefusedError(
                "is not at hand: this server takes data URIs alone (data:image/png;base64,...) and fetches nothing. "
                "Send the file's content, or start the server with --allow-images-from HOST."
            )
        if not self.hosts.allow(host, port, parts.scheme):
            raise RefusedError(f"leads to {_shown(host, given)}; this server fetches from {self.hosts} alone.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return parts, httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=path)


def _held(content: bytes, what: str) -> Media:
    return VideoFile(content) if what == "video" else content


async def _content(reply: httpcore2.Response, fields: dict[bytes, str], budget: _Budget, what: str) -> bytes:
    if reply.status != 200:
        raise RefusedError(f"was answered with status {reply.status}.")
    kind = fields.get(b"content-type", OPAQUE[0]).partition(";")[0].strip().lower()
    if not kind.startswith(f"{what}/") and kind not in OPAQUE:
        raise RefusedError(f"is {kind[:60]}, no {what}.")
    declared = fields.get(b"content-length", "")
    if declared.isdigit():
        budget.check(int(declared))
    chunks = []
    async for chunk in reply.aiter_stream():
        budget.take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


class _Budget:
    """What the images and videos of one request may still take."""

    def __init__(self, most: int) -> None:
        self.most, self.left = most, most

    def check(self, size: int) -> None:
        if size > self.left:
            raise RefusedError(f"is too large: the files of a request may take {self.most / 1e6:g} MB together.")

    def take(self, size: int) -> None:
        self.check(size)
        self.left -= size


class _CheckedBackend(AsyncNetworkBackend):
    """Connects to addresses that may be reached, and to the very ones that were checked: a name is looked up once."""

    def __init__(self, hosts: ImageHosts) -> None:
        self.hosts, self._plain = hosts, httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
        reached = [address for address in addresses if self.hosts.reach(host, address)]
        if not reached:
            raise RefusedError(
                f"leads to {addresses[0]}, which is no public address. Whoever runs the server can allow it with "
                f"--allow-images-from {addresses[0]}."
            )
        for address in reached[:-1]:
            try:
                return await self._plain.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore2.ConnectError:
                continue
        return await self._plain.connect_tcp(reached[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._plain.sleep(seconds)


def _refusal(image: RemoteFile, what: str) -> ApiError:
    return wrong(f"{image.param}: {image.url[:80]!r} {what}", image.param, f"invalid_{image.what}_url")
