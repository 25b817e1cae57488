"""The judge, against a real HTTP server on this machine: retries, limits, cache, cost, and a key that goes nowhere else."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.judge_server import Response, completion, judge_server
from tinylmm.errors import ConfigError, StoppedError
from tinylmm.evaluation.judge import Judge, JudgeError
from tinylmm.stop import watch_for_stop

KEY = "sk-very-secret"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is no way to this machine
    monkeypatch.delenv("no_proxy", raising=False)


def replies(*responses: Response) -> Any:
    """Give the responses one after the other, the last one for ever."""
    waiting = list(responses)
    return lambda body: waiting.pop(0) if len(waiting) > 1 else waiting[0]


@pytest.fixture
def pauses() -> list[float]:
    return []


def test_a_reply_is_the_message_text_and_its_tokens_are_counted() -> None:
    with judge_server(replies(completion("0.7", 11, 3))) as server:
        judge = Judge(server.url + "/", "gpt-4-0613")
        assert judge.ask(HELLO, max_tokens=3, temperature=0.5) == "0.7"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "gpt-4-0613", "messages": HELLO, "max_tokens": 3, "temperature": 0.5}
    assert judge.usage.counts() == {
        "judge_requests": 1,
        "judge_retries": 0,
        "judge_cached": 0,
        "judge_prompt_tokens": 11,
        "judge_completion_tokens": 3,
    }


def test_without_a_key_no_header_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYLMM_JUDGE_API_KEY")
    with judge_server(replies(completion("ok"))) as server:
        Judge(server.url, "m").ask(HELLO, max_tokens=3)
    assert "Authorization" not in server.requests[0][1]


def test_busy_and_broken_servers_are_asked_again_with_growing_pauses(pauses: list[float]) -> None:
    script = replies(
        (429, {"Retry-After": "9"}, b"slow down"),
        (500, {}, b"oops"),
        (200, {}, b"<html>not json"),
        (200, {}, b'{"choices": []}'),
        completion("fine"),
    )
    with judge_server(script) as server:
        judge = Judge(server.url, "m", sleep=pauses.append, max_backoff=9.0)
        assert judge.ask(HELLO, max_tokens=3) == "fine"
    assert pauses == [9.0, 2.0, 4.0, 8.0]
    assert (judge.usage.requests, judge.usage.retries) == (5, 4)


def test_a_server_that_never_recovers_ends_in_an_error_that_keeps_the_key_out(pauses: list[float]) -> None:
    with judge_server(replies((503, {}, f"no capacity for {KEY}".encode()))) as server:
        judge = Judge(server.url, "m", attempts=3, sleep=pauses.append)
        with pytest.raises(
            JudgeError, match=r"no usable reply in 3 attempts.*HTTP 503.*no capacity for <key>"
        ) as caught:
            judge.ask(HELLO, max_tokens=3)
    assert KEY not in str(caught.value)
    assert len(server.requests) == 3 and len(pauses) == 2


@pytest.mark.parametrize(("status", "hint"), [(401, "Set TINYLMM_JUDGE_API_KEY"), (404, "Check the judge's base_url")])
def test_a_refused_request_is_not_repeated(status: int, hint: str) -> None:
    refusing = replies((status, {}, f"bad key {KEY}".encode()))
    with judge_server(refusing) as server, pytest.raises(ConfigError, match=hint) as caught:
        Judge(server.url, "m").ask(HELLO, max_tokens=3)
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)


def test_a_redirect_is_not_followed_as_the_key_would_go_along() -> None:
    with judge_server(replies(completion("stolen"))) as thief:
        moved = replies((302, {"Location": thief.url}, b""))
        with judge_server(moved) as server, pytest.raises(ConfigError, match="HTTP 302"):
            Judge(server.url, "m").ask(HELLO, max_tokens=3)
        assert thief.requests == []


def test_slow_endless_and_absent_servers_are_given_up(pauses: list[float]) -> None:
    def slow(body: dict[str, Any]) -> Response:
        time.sleep(0.3)
        return completion("late")

    with judge_server(slow) as server:
        judge = Judge(server.url, "m", attempts=1, timeout=0.1)
        with pytest.raises(JudgeError, match=r"timed out|no complete reply within 0\.1 s"):
            judge.ask(HELLO, max_tokens=3)
    with judge_server(replies(completion("x" * 5000))) as server:
        judge = Judge(server.url, "m", attempts=1, max_bytes=1000)
        with pytest.raises(JudgeError, match="longer than 1,000 bytes"):
            judge.ask(HELLO, max_tokens=3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        absent = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match="refused"):
            Judge(absent, "m", attempts=2, sleep=pauses.append).ask(HELLO, max_tokens=3)


def test_the_same_question_is_paid_for_once_also_by_another_process_object(tmp_path: Path) -> None:
    with judge_server(replies(completion("0.5"))) as server:
        first = Judge(server.url, "m", cache=tmp_path)
        assert first.ask(HELLO, max_tokens=3) == first.ask(HELLO, max_tokens=3) == "0.5"
        assert (first.usage.requests, first.usage.cached) == (1, 1)
        second = Judge(server.url, "m", cache=tmp_path)
        assert second.ask(HELLO, max_tokens=3) == "0.5"
        assert second.usage.requests == 0
        # anything that may change the reply is another question: sampling, run, model
        second.ask(HELLO, max_tokens=3, temperature=0.5)
        second.ask(HELLO, max_tokens=3, sample=1)
        Judge(server.url, "n", cache=tmp_path).ask(HELLO, max_tokens=3)
        assert len(server.requests) == 4


def test_the_cache_never_holds_the_key_and_survives_a_broken_file(tmp_path: Path) -> None:
    with judge_server(replies(completion("0.5"))) as server:
        judge = Judge(server.url, "m", cache=tmp_path)
        judge.ask(HELLO, max_tokens=3)
        (kept,) = tmp_path.rglob("*.json")
        assert KEY not in kept.read_text()
        assert json.loads(kept.read_text())["reply"] == "0.5"
        kept.write_text("{cut sho")
        assert judge.ask(HELLO, max_tokens=3) == "0.5"
        assert judge.usage.requests == 2
        assert json.loads(kept.read_text())["reply"] == "0.5"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_the_key_is_not_logged(caplog: pytest.LogCaptureFixture, pauses: list[float]) -> None:
    with judge_server(replies((500, {}, f"for {KEY}".encode()), completion("ok"))) as server:
        Judge(server.url, "m", sleep=pauses.append).ask(HELLO, max_tokens=3)
    assert "HTTP 500" in caplog.text
    assert KEY not in caplog.text


def test_a_refusal_without_content_is_an_empty_text() -> None:
    with judge_server(replies(completion(None))) as server:
        assert Judge(server.url, "m").ask(HELLO, max_tokens=3) == ""


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        ("api.openai.com/v1", "m", "is no address of an endpoint"),
        ("file:///etc/passwd", "m", "is no address of an endpoint"),
        ("https://user:hunter2@host/v1", "m", "must hold no user or password"),
        ("https://host:port/v1", "m", "is no address of an endpoint"),
        ("https://host/v1", "", "judge.model: is empty"),
    ],
)
def test_a_wrong_address_or_model_is_refused_at_once(url: str, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Judge(url, model)
    assert "hunter2" not in str(caught.value)


def test_several_questions_are_under_way_at_once_and_come_back_in_order() -> None:
    together = threading.Barrier(3, timeout=10)  # nobody is answered before three have asked

    def respond(body: dict[str, Any]) -> Response:
        together.wait()
        return completion(body["messages"][0]["content"].upper(), 1, 1)

    with judge_server(respond) as server:
        judge = Judge(server.url, "m", parallel=3)
        asked = judge.map(lambda word: judge.ask([{"role": "user", "content": word}], max_tokens=3), ["a", "b", "c"])
    assert asked == ["A", "B", "C"]
    assert (judge.usage.requests, judge.usage.prompt_tokens) == (3, 3)


def test_the_first_error_ends_a_series(pauses: list[float]) -> None:
    with judge_server(replies((401, {}, b""))) as server:
        judge = Judge(server.url, "m", parallel=1)
        with pytest.raises(ConfigError, match="HTTP 401"):
            judge.map(lambda word: judge.ask([{"role": "user", "content": word}], max_tokens=3), [*"abcdefgh"])
    assert len(server.requests) == 1


@contextmanager
def dripping(reply: bytes) -> Iterator[str]:
    """A server that sends its reply at once and its last byte again every 20 ms, for ever; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                connection.recv(65536)
                connection.sendall(reply)
                for _ in range(10_000):
                    time.sleep(0.02)
                    connection.sendall(reply[-1:])

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK and more of that line",
        b"HTTP/1.1 200 OK\r\nX: y\r\nX: y",
        b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 90000\r\n\r\nbusy",
    ],
    ids=["status", "headers", "body", "chunk size", "error"],
)
def test_a_reply_that_drips_is_given_up_when_its_time_is_over(reply: bytes) -> None:
    with dripping(reply) as url:
        judge, began = Judge(url, "m", attempts=1, timeout=1.5), time.monotonic()
        with pytest.raises(JudgeError, match=r"no complete reply within 1\.5 s|HTTP 500 Oops: busy"):
            judge.ask(HELLO, max_tokens=3)
    assert time.monotonic() - began < 4


def test_a_stop_does_not_wait_for_a_judge_that_hangs() -> None:
    released = threading.Event()
    with judge_server(lambda body: (released.wait(30), completion("late"))[1]) as server, watch_for_stop():
        judge, began = Judge(server.url, "m"), time.monotonic()
        threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)).start()
        with pytest.raises(StoppedError, match="replies so far are kept"):
            judge.map(lambda value: judge.ask([{"role": "user", "content": value}], max_tokens=3), "abcdef")
        assert time.monotonic() - began < 3
        released.set()


SCORING = """
import sys
from tinylmm.cli.errors import guarded
from tinylmm.evaluation.judge import Judge
judge = Judge(sys.argv[1], "m")
sys.exit(guarded(lambda: judge.map(lambda value: judge.ask([], max_tokens=3), "abcdef") and 0))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_waits_for_a_judge_ends_with_the_signal(number: signal.Signals) -> None:
    released = threading.Event()
    with judge_server(lambda body: (released.wait(30), completion("late"))[1]) as server:
        command = [sys.executable, "-c", SCORING, server.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not server.requests:
            time.sleep(0.01)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(10) == 75
        assert time.monotonic() - began < 3
        assert process.stderr is not None and "the same command continues" in process.stderr.read()
        released.set()


LONG_KEY = "sk-proj-Ab3/dE6+gH9=kL2_nO5"
ECHOES = {
    "as it is": LONG_KEY,
    "JSON": json.dumps(LONG_KEY).replace("/", "\\/"),
    "JSON numbers": "".join(f"\\u{ord(character):04x}" for character in LONG_KEY),
    "JSON twice": "".join(f"\\\\u{ord(character):04X}" for character in LONG_KEY),
    "hex escapes": "".join(f"\\x{ord(character):02x}" for character in LONG_KEY),
    "URL": "".join(f"%{ord(character):02X}" for character in LONG_KEY),
    "HTML": "".join(f"&#{ord(character)};" for character in LONG_KEY),
    "base64": base64.b64encode(f"Authorization: Bearer {LONG_KEY}!".encode()).decode(),
    "base64 of it alone": base64.b64encode(LONG_KEY.encode()).decode(),
    "hexadecimal": LONG_KEY.encode().hex(),
    "spaced": " ".join(LONG_KEY),
    "upper case": LONG_KEY.upper(),
    "cut": LONG_KEY[: len(LONG_KEY) * 2 // 3],
    "behind much else": "x" * (300 - 8) + LONG_KEY,
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [401, 503, 200])
def test_a_key_that_the_server_echoes_is_shown_in_no_form(
    status: int, echo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pauses: list[float]
) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", LONG_KEY)
    server = judge_server(replies((status, {}, f"bad key {echo}".encode())))
    with server as running, pytest.raises((JudgeError, ConfigError)) as caught:
        Judge(running.url, "m", attempts=2, sleep=pauses.append).ask(HELLO, max_tokens=3)
    said = str(caught.value) + caplog.text
    assert echo not in said and LONG_KEY[:12] not in said and "sk-proj" not in said


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_a_key_that_a_reply_or_a_question_holds_is_kept_in_no_form(
    echo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", LONG_KEY)
    with judge_server(replies(completion(f"0.5, and my key is {echo}"), completion("0.5"))) as server:
        judge = Judge(server.url, "m", cache=tmp_path)
        said = judge.ask(HELLO, max_tokens=3)
        assert judge.ask(HELLO, max_tokens=3) == said
        question = [{"role": "user", "content": f"the model said {echo}"}]
        assert judge.ask(question, max_tokens=3) == judge.ask(question, max_tokens=3) == "0.5"
    assert len(server.requests) == 2
    kept = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(kept) == 2 and sorted(json.loads(text)["reply"] for text in kept) == sorted([said, "0.5"])
    for text in (said, *kept):
        assert echo not in text and json.dumps(echo)[1:-1] not in text and "sk-proj" not in text


def test_a_word_that_is_set_as_the_key_of_a_local_server_stays_in_replies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", "0")
    with judge_server(replies(completion("0.5"))) as server:
        judge = Judge(server.url, "m", cache=tmp_path)
        assert judge.ask(HELLO, max_tokens=3) == judge.ask(HELLO, max_tokens=3) == "0.5"


def test_what_a_server_says_without_the_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", LONG_KEY)
    said = "Incorrect API key provided: sk-proj-****nO5. You can find yours at https://platform.example.com/keys."
    with judge_server(replies((401, {}, said.encode()))) as server, pytest.raises(ConfigError) as caught:
        Judge(server.url, "m").ask(HELLO, max_tokens=3)
    assert said in str(caught.value)
