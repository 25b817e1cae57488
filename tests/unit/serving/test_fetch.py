"""Images by http come from the hosts that were named, within their limits, and from nowhere else."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import tinylmm
from tests.unit.serving.process import RED, N, png, serving, uri, user, wide_model, words
from tinylmm.errors import UserError
from tinylmm.serving.errors import ApiError
from tinylmm.serving.fetch import Fetcher, ImageHosts
from tinylmm.serving.messages import read_messages

FILE = png(RED)
MOST = 100_000
LEADS = {"/away": "http://[::1]:9/red.png", "/on": "/red.png", "/round": "/round", "/file": "file:///etc/passwd"}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path in LEADS:
            self._head(302, {"Location": LEADS[self.path]})
        elif self.path == "/red.png":
            self._head(200, {"Content-Type": "image/png", "Content-Length": str(len(FILE))}, FILE)
        elif self.path in self.server.files:  # type: ignore[attr-defined]
            kind, content = self.server.files[self.path]  # type: ignore[attr-defined]
            self._head(200, {"Content-Type": kind, "Content-Length": str(len(content))}, content)
        elif self.path == "/page":
            self._head(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html></html>")
        elif self.path == "/said":
            self._head(200, {"Content-Type": "image/png", "Content-Length": "999999999999"})
        elif self.path == "/endless":
            self._head(200, {"Content-Type": "image/png"})
            while not self.server.over.is_set():  # type: ignore[attr-defined]
                self.wfile.write(b"\0" * 4096)
        elif self.path == "/broken":
            self._head(200, {"Content-Type": "image/png", "Content-Length": "1000"}, FILE)
        elif self.path == "/silent":
            self.server.over.wait()  # type: ignore[attr-defined]
        elif self.path == "/drips":
            self._head(200, {"Content-Type": "image/png"})
            while not self.server.over.wait(0.05):  # type: ignore[attr-defined]
                self.wfile.write(b"\0")
        else:
            self._head(404, {})

    def _head(self, status: int, fields: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.files: dict[str, tuple[str, bytes]] = {}
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has heard enough closes the connection


def serve_files() -> Iterator[_Server]:
    """A running host, ended behind it."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def pictures() -> Iterator[_Server]:
    yield from serve_files()


def place(server: _Server, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_port}{path}"


def fetch(urls: list[str], hosts: list[str], seconds: float = 30) -> list[bytes]:
    """The files behind URLs, as one message's images."""
    message = user(*[{"type": "image_url", "image_url": {"url": url}} for url in urls], words("?"))

    async def fetched() -> list[bytes]:
        [files] = await Fetcher(hosts, seconds, MOST).files(read_messages([message]))
        return files

    return asyncio.run(fetched())


def refused(url: str, hosts: list[str], seconds: float = 30) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch([uri(RED), url], hosts, seconds)
    error = caught.value
    assert (error.status, error.param, error.code) == (
        400,
        "messages[0].content[1].image_url",
        "invalid_image_url",
    )
    assert error.message.startswith(f"{error.param}: ")
    return error


def test_images_of_a_named_host_are_fetched_once_each_and_stand_in_their_order(pictures: _Server) -> None:
    blue, url = uri(Image.new("RGB", (8, 8), (0, 0, 255))), place(pictures, "/red.png")
    found = fetch([url, blue, place(pictures, "/on"), url], [f"127.0.0.1:{pictures.server_port}"])
    assert found[0] == found[2] == found[3] == FILE != found[1]
    assert sorted(pictures.asked) == ["/on", "/red.png", "/red.png"]


@pytest.mark.parametrize(
    ("path", "words"),
    {
        "redirect to another host": ("/away", "leads to [::1]:9; this server fetches from 127.0.0.1:"),
        "redirect to a file": ("/file", "leads to 'file:///etc/passwd'; only http and https"),
        "redirect without end": ("/round", "leads on more than 3 times"),
        "page": ("/page", "is text/html, no image"),
        "missing": ("/none", "was answered with status 404"),
        "declared too large": ("/said", "the files of a request may take 0.1 MB together"),
        "sent without end": ("/endless", "the files of a request may take 0.1 MB together"),
        "cut short": ("/broken", "could not be fetched"),
    }.values(),
    ids=lambda value: value if value.startswith("/") else "",
)
def test_what_a_host_sends_is_taken_within_its_limits_alone(pictures: _Server, path: str, words: str) -> None:
    assert words in refused(place(pictures, path), [f"127.0.0.1:{pictures.server_port}"]).message


@pytest.mark.parametrize("path", ["/silent", "/drips"])
def test_a_slow_host_is_given_up(pictures: _Server, path: str) -> None:
    named = [f"127.0.0.1:{pictures.server_port}"]
    assert "took more than 0.3 s to fetch" in refused(place(pictures, path), named, seconds=0.3).message


def test_hosts_that_were_not_named_are_not_asked(pictures: _Server) -> None:
    port = pictures.server_port
    for url, hosts in [
        (place(pictures, "/red.png"), []),
        (place(pictures, "/red.png"), ["images.example.org"]),
        (place(pictures, "/red.png"), ["127.0.0.1"]),  # its port was not named
        (place(pictures, "/red.png", "localhost"), [f"127.0.0.1:{port}"]),
        (place(pictures, "/red.png", f"images.example.org:{port}@127.0.0.1"), [f"images.example.org:{port}"]),
        (place(pictures, "/red.png", "2130706433"), [f"127.0.0.1:{port}"]),
        (f"http://127.0.0.1:{port}\\@images.example.org/red.png", [f"127.0.0.1:{port}"]),
        (place(pictures, "/red file.png"), [f"127.0.0.1:{port}"]),
        (f"http://127.0.0.1:{port}99/red.png", [f"127.0.0.1:{port}"]),
        ("http://[/red.png", [f"127.0.0.1:{port}"]),
        ("https://", [f"127.0.0.1:{port}"]),
    ]:
        refused(url, hosts)
    assert pictures.asked == []


def test_a_public_name_that_leads_into_this_network_is_refused_until_the_address_is_named(
    pictures: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        return real("127.0.0.1" if host == "images.example.org" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    url, named = place(pictures, "/red.png", "images.example.org"), f"images.example.org:{pictures.server_port}"
    assert "leads to 127.0.0.1, which is no public address" in refused(url, [named]).message
    assert pictures.asked == []
    assert fetch([url], [named, "127.0.0.1"]) == [FILE]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *[
            (address, False)
            for address in (
                "127.0.0.1",
                "10.1.2.3",
                "172.16.0.1",
                "192.168.0.1",
                "169.254.169.254",
                "100.64.0.1",
                "0.0.0.0",
                "224.0.0.1",
                "::1",
                "fe80::1%eth0",
                "fd00::1",
                "::ffff:127.0.0.1",
                "::ffff:169.254.169.254",
            )
        ],
    ],
)
def test_addresses_that_are_not_public_are_known(address: str, public: bool) -> None:
    assert ImageHosts.of(["images.example.org"]).reach("images.example.org", address) is public


@pytest.mark.parametrize(
    "word", ["", "*.example.org", "http://a.org", "a.org/x", "me@a.org", "a.org:x", "bücher.de", "[::1"]
)
def test_a_host_that_is_no_host_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="exact name or address"):
        ImageHosts.of([word])


def test_a_server_answers_about_images_of_the_hosts_that_it_was_told(pictures: _Server, tmp_path: Path) -> None:
    folder = wide_model(tmp_path / "tiny")
    expected = tinylmm.load(folder, device="cpu").chat("What is it?", FILE, max_new_tokens=N)

    def asked(path: str) -> list[Any]:
        return [user({"type": "image_url", "image_url": {"url": place(pictures, path)}}, words("What is it?"))]

    with serving(folder, "--allow-images-from", f"127.0.0.1:{pictures.server_port}", "--body-mb", "0.1") as server:
        create = server.openai.chat.completions.create
        reply = create(model="tiny", messages=asked("/red.png"), max_tokens=N)
        assert reply.choices[0].message.content == expected
        for path in ("/page", "/said", "/away", "/none"):
            with pytest.raises(openai.BadRequestError) as caught:
                create(model="tiny", messages=asked(path), max_tokens=N)
            assert caught.value.code == "invalid_image_url" and place(pictures, path) in caught.value.message
        response = server.openai.responses.create(
            model="tiny",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": place(pictures, "/red.png"), "detail": "auto"},
                        {"type": "input_text", "text": "What is it?"},
                    ],
                }
            ],
            max_output_tokens=N,
        )
        assert response.output_text == expected
