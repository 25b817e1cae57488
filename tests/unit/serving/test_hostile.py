"""Requests that are wrong, broken or mean get a sentence in OpenAI's form, and the server answers the next one."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import tinylmm
from tests.unit.serving.process import RED, Server, picture, png, serving, user, wide_model, words

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = ("--body-mb", "1", "--read-s", "1", "--max-images", "3", "--max-pixels", "10000")
    with serving(folder, *limits) as running:
        yield running


def send(
    server: Server,
    body: bytes,
    headers: dict[str, str] = JSON,
    path: str = "/v1/chat/completions",
    method: str = "POST",
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    return reply.status, found


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says that it is large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def data(file: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(file).decode()}"}}


def jpeg_of_many_pixels() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100)).save(buffer, "JPEG")
    return buffer.getvalue()


def from_url(url: Any) -> dict[str, Any]:
    return {"messages": [user({"type": "image_url", "image_url": url}, words("?"))]}


GOOD: dict[str, Any] = {"messages": [user("Who are you?")], "max_tokens": 4}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
IMAGE = "messages[0].content[0].image_url"
WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no messages": ({}, "'messages' is missing", "messages"),
    "empty messages": ({"messages": []}, "at least 1", "messages"),
    "messages of texts": ({"messages": ["hi"]}, "valid dictionary", "messages.0"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'; first comes user", "messages[0].role"),
    "roles": ({"messages": [user("a"), user("b")]}, "behind the user's comes assistant", "messages[1].role"),
    "late system": ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "'system'", "messages[1].role"),
    "ends otherwise": ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "must end", "messages"),
    "content": ({"messages": [{"role": "user", "content": 7}]}, "content is '7'", "messages[0].content"),
    "no content": ({"messages": [{"role": "user"}]}, "content is 'None'", "messages[0].content"),
    "empty parts": ({"messages": [{"role": "user", "content": []}]}, "allowed: a text", "messages[0].content"),
    "part": ({"messages": [user({"type": "input_audio"}, words(""))]}, "input_audio", "messages[0].content[0]"),
    "image of a system": ({"messages": [{"role": "system", "content": [picture(RED)]}]}, "allowed", None),
    "slot without image": ({"messages": [user("What is <image>?")]}, "1 times `<image>`", "messages[0].content"),
    "slots": ({"messages": [user(picture(RED), words("<image> <image>"))]}, "2 times", "messages[0].content"),
    "http image": (from_url("http://10.0.0.1/x.png"), "fetches nothing", IMAGE),
    "file image": (
        {"messages": [user({"type": "image_url", "image_url": "/etc/passwd"}, words(""))]},
        "data URI",
        IMAGE,
    ),
    "file URL": (
        {"messages": [user({"type": "image_url", "image_url": "file:///etc/passwd"}, words(""))]},
        "data",
        IMAGE,
    ),
    "image of a number": (
        {"messages": [user({"type": "image_url", "image_url": 5}, words(""))]},
        "must be a data",
        IMAGE,
    ),
    "no base64": (from_url("data:image/png;base64,!"), "no base64", IMAGE),
    "text as image": ({"messages": [user(data(b"hello", "text/plain"), words(""))]}, "data:image/", IMAGE),
    "not an image": ({"messages": [user(data(b"hello"), words(""))]}, "image 1 of the request: not a readable", None),
    "svg": ({"messages": [user(data(SVG, "image/svg+xml"), words(""))]}, "not a readable", "messages"),
    "cut short": ({"messages": [user(data(png(RED)[:-40]), words(""))]}, "damaged or cut short", "messages"),
    "bomb": ({"messages": [user(data(bomb(60000, 60000)), words(""))]}, "too large", "messages"),
    "large": ({"messages": [user(data(jpeg_of_many_pixels(), "image/jpeg"), words(""))]}, "at most 10,000", "messages"),
    "many images": ({"messages": [user(*[picture(RED)] * 4, words("?"))]}, "4 images; this server takes 3", "messages"),
    "too long": ({"messages": [user("what is it " * 200)]}, "the model reads 256 at most", "messages"),
    "unknown": ({"tempature": 1}, "no parameter 'tempature'. Did you mean 'temperature'?", "tempature"),
    "temperature": ({"temperature": -1}, "temperature is -1", "temperature"),
    "infinite": ({"temperature": float("inf")}, "temperature is inf", "temperature"),
    "not a number": ({"top_p": float("nan")}, "top_p is nan", "top_p"),
    "a text": ({"max_tokens": "5"}, "max_tokens is '5'", "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
    "seed": ({"seed": 10**30}, "seed is 1", "seed"),
    "n": ({"n": 100}, "8 answers to a request", "n"),
    "stop": ({"stop": ["a"] * 17}, "at most 16", "stop"),
    "empty stop": ({"stop": ""}, "none of them empty", "stop"),
    "top log-probabilities": ({"top_logprobs": 3}, "needs logprobs", "top_logprobs"),
    "tools": ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty is not supported; leave it out", "frequency_penalty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_the_field(server: Server, case: str) -> None:
    changes, message, param = WRONG[case]
    asked = changes if case == "no messages" else GOOD | changes
    status, found = send(server, json.dumps(asked).encode())
    assert status == 400 and set(found["error"]) == {"message", "type", "param", "code"}, found
    assert message in found["error"]["message"] and found["error"]["type"] == "invalid_request_error"
    assert param is None or found["error"]["param"] == param


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    more = {
        "user": "me",
        "store": False,
        "tools": [],
        "tool_choice": "auto",
        "frequency_penalty": 0,
        "temperature": None,
    }
    assert send(server, json.dumps(GOOD | more).encode())[0] == 200
    assert send(server, json.dumps(GOOD).encode().ljust(1_000_000))[0] == 200


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "deep inside": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a character": b'{"messages": "\\ud800"}',
    "no UTF-8": b'{"messages": "\xff"}',
    "a zero": b"\0",
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_request_is_refused(server: Server, case: str) -> None:
    status, found = send(server, BODIES[case])
    assert status == 400 and found["error"]["type"] == "invalid_request_error", found


def test_type_size_method_path_and_model_are_checked(server: Server) -> None:
    good = json.dumps(GOOD).encode()
    cases = [
        (send(server, good, {"Content-Type": "text/plain"}), 415, "send `Content-Type: application/json`"),
        (send(server, b" " * 1_000_001), 413, "larger than 1 MB"),
        (send(server, b"", path="/v1/nothing"), 404, "Not Found"),
        (send(server, b"", method="DELETE"), 405, "Method Not Allowed"),
        (
            send(server, json.dumps(GOOD | {"model": "gpt"}).encode()),
            404,
            "no model 'gpt' here; this server has 'tiny'",
        ),
        (send(server, good, JSON | {"Host": "evil.example"}), 403, "answers to localhost, 127.0.0.1"),
    ]
    for (status, found), expected, message in cases:
        assert status == expected and message in found["error"]["message"], found
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        server.openai.models.retrieve("other")


def raw(server: Server, *parts: bytes, pause: float = 0) -> bytes:
    """What comes back until the server ends the connection, or breaks it."""
    found = b""
    with socket.create_connection(server.address, timeout=30) as connection, suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        while more := connection.recv(65536):
            found += more
    return found


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_what_is_no_http_what_never_ends_and_what_lies_about_its_length_is_cut_off(server: Server) -> None:
    assert b" 400 " in raw(server, b"GARBAGE\r\n\r\n")
    assert b" 200 " not in raw(server, HEAD + b"X: " + b"a" * 200_000)
    assert b" 408 " in raw(server, HEAD + b'Content-Length: 100\r\n\r\n{"mess')  # and then silence
    name = 'tinylmm_requests_total{path="/v1/chat/completions",status="413"}'
    before = server.metrics().get(name, 0)
    stream = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    assert b" 200 " not in raw(server, stream, *[b"20000\r\n" + b" " * 0x20000 + b"\r\n"] * 80)
    assert server.metrics()[name] == before + 1


@pytest.mark.parametrize(
    "head, parts",
    [
        (b"Content-Length: 3900000\r\n\r\n", [b" " * 1_300_000] * 3),
        (b"Transfer-Encoding: chunked\r\n\r\n", [b"100000\r\n" + b" " * 0x100000 + b"\r\n"] * 3 + [b"0\r\n\r\n"]),
        (b"Content-Length: 3900000\r\n\r\n", [b" " * 1_300_000]),  # and then silence
    ],
)
def test_a_client_that_sends_too_much_before_it_reads_still_sees_why(
    server: Server, head: bytes, parts: list[bytes]
) -> None:
    assert b" 413 " in raw(server, HEAD + head, *parts, pause=0.1)


def test_after_all_that_it_answers_as_before(server: Server, folder: Path) -> None:
    model = tinylmm.load(folder, device="cpu")
    reply = server.openai.chat.completions.create(
        model="tiny",
        messages=[user(picture(RED), words("What is it?"))],  # type: ignore[list-item]
        max_tokens=20,
    )
    assert reply.choices[0].message.content == model.chat("What is it?", RED, max_new_tokens=20)
    counts = server.metrics()
    assert counts["tinylmm_answers_running"] == counts["tinylmm_answers_waiting"] == 0
    assert not [name for name in counts if 'status="500"' in name]
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors, errors


def test_a_key_is_asked_of_everybody_but_those_who_look_whether_it_lives(folder: Path) -> None:
    with serving(folder, TINYLMM_API_KEY="käse") as server:
        for key in ("none", ""):
            status, found = send(server, json.dumps(GOOD).encode(), JSON | {"Authorization": f"Bearer {key}"})
            assert status == 401 and found["error"]["code"] == "invalid_api_key"
        assert send(server, b"", path="/metrics", method="GET")[0] == 401
        assert send(server, b"", path="/health", method="GET") == (200, {"status": "ok"})
        right = JSON | {"Authorization": "Bearer käse".encode().decode("latin-1"), "Host": "proxy.example"}
        assert send(server, json.dumps(GOOD).encode(), right)[0] == 200
