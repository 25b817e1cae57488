"""A full queue, clients that vanish, signals: nobody waits for nothing, and what is begun is finished."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import tinylmm
from tests.unit.serving.process import Server, endless_model, picture, serving, user, wide_model, words
from tinylmm.generation.session import ChatModel

LONG, ENDLESS = 300, 12_000
WAITING, RUNNING, GONE = "tinylmm_answers_waiting", "tinylmm_answers_running", "tinylmm_clients_gone_total"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Server]:
    """One answer at a time, two wait."""
    with serving(folder, "--rows", "1", "--queue", "2") as running:
        yield running


def ask(server: Server, question: str, length: int, **options: Any) -> Any:
    return server.openai.chat.completions.create(
        model="tiny",
        messages=[user(question)],  # type: ignore[list-item]
        max_tokens=length,
        **options,
    )


def leave(server: Server, question: str, stream: bool, **more: Any) -> socket.socket:
    """Ask for an answer without end; closing the connection is leaving."""
    asked = {"messages": [user(question)], "max_tokens": ENDLESS, "stream": stream} | more
    body = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(server.address, timeout=120)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_clients_that_leave_make_room_whether_they_were_answered_or_waited(narrow: Server, folder: Path) -> None:
    before = narrow.metrics()[GONE]
    answered = leave(narrow, "Who are you?", stream=False)
    narrow.wait_for(RUNNING, 1)
    waiting = [leave(narrow, "Who?", stream=False), leave(narrow, "What?", stream=True)]
    narrow.wait_for(WAITING, 2)
    waiting[0].close()
    narrow.wait_for(WAITING, 1)
    answered.close()
    waiting[1].recv(1)  # its turn has come
    narrow.wait_for(WAITING, 0)
    waiting[1].close()
    narrow.wait_for(RUNNING, 0)
    assert narrow.metrics()[GONE] == before + 3
    model = tinylmm.load(folder, device="cpu")
    assert ask(narrow, "Why?", 20).choices[0].message.content == model.chat("Why?", max_new_tokens=20)


def test_a_client_that_does_not_take_its_answer_is_let_go(folder: Path) -> None:
    with serving(folder, "--rows", "1", "--read-s", "0.5") as server:
        with leave(server, "Who are you?", stream=True, logprobs=True, top_logprobs=20):
            server.wait_for(RUNNING, 1)
            server.wait_for(RUNNING, 0)
            counts = server.metrics()
        assert counts[GONE] == 1 and counts["tinylmm_new_tokens_total"] < ENDLESS
        assert ask(server, "Why?", 3).choices[0].finish_reason == "length"


def test_a_full_queue_says_when_to_come_again_and_those_in_it_are_answered(narrow: Server, folder: Path) -> None:
    model = tinylmm.load(folder, device="cpu")
    first = leave(narrow, "Who are you?", stream=True)
    narrow.wait_for(RUNNING, 1)
    with ThreadPoolExecutor(2) as pool:
        queued = [pool.submit(ask, narrow, question, 20) for question in ("Why?", "What?")]
        narrow.wait_for(WAITING, 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(narrow, "Who?", 20)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert refused.value.body["code"] == "queue_full"  # type: ignore[index, call-overload]
        with pytest.raises(openai.BadRequestError, match="this server has 3 places in all"):
            ask(narrow, "Who?", 20, n=4)
        first.close()
        answers = [one.result().choices[0].message.content for one in queued]
    assert answers == [model.chat(question, max_new_tokens=20) for question in ("Why?", "What?")]
    patient = narrow.client(max_retries=2).chat.completions
    reply = patient.create(model="tiny", messages=[user("Who?")], max_tokens=3)  # type: ignore[list-item]
    assert reply.choices[0].finish_reason == "length"


def test_a_signal_lets_answers_be_finished_and_takes_no_new_ones(folder: Path) -> None:
    model = tinylmm.load(folder, device="cpu")
    expected = model.chat("Who are you?", max_new_tokens=LONG)
    with serving(folder, "--rows", "2") as server, ThreadPoolExecutor(3) as pool:
        stream = ask(server, "Who are you?", LONG, stream=True)
        pieces = [next(stream).choices[0].delta.content or ""]
        others = [pool.submit(ask, server, question, LONG) for question in ("Why?", "What?", "Who?")]
        server.wait_for(WAITING, 2)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            except OSError:
                break
        else:
            pytest.fail("it still takes requests")
        pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == expected
        for question, other in zip(("Why?", "What?", "Who?"), others, strict=True):
            assert other.result().choices[0].message.content == model.chat(question, max_new_tokens=LONG)
        _, errors = server.process.communicate(timeout=180)
        assert (server.process.returncode, "Traceback" in errors) == (0, False), errors


@pytest.mark.parametrize("again", [False, True])
def test_what_cannot_be_finished_in_time_or_after_a_second_signal_is_given_up(folder: Path, again: bool) -> None:
    with serving(folder, "--drain-s", "60" if again else "1") as server:
        connections = [leave(server, "Who are you?", stream) for stream in (True, False)]
        server.wait_for(RUNNING, 2)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        if again:
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
        _, errors = server.process.communicate(timeout=300)
        assert time.monotonic() - began < 45
        assert (server.process.returncode, "Traceback" in errors) == (0, False), errors
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing is neither a folder nor the name of a run"),
        (["{folder}", "--port", "99999"], "--port is 99999; it must be 0"),
        (["{folder}", "--host", "192.0.2.1"], "192.0.2.1:8000 is not to be had"),
        (["{folder}", "--rows", "0"], "--rows is 0; it must be 1 or more"),
        (["{folder}", "--drain-s", "-1"], "--drain-s is -1.0; it must be above 0"),
        (["{folder}", "--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(folder: Path, words: list[str], message: str) -> None:
    command = [sys.executable, "-m", "tinylmm.cli.main", "serve", *[word.format(folder=folder) for word in words]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done


def test_a_taken_port_and_a_missing_package_are_told(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "tinylmm.cli.main", "serve", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and f"127.0.0.1:{port} is not to be had" in done.stderr
    code = "import sys; sys.modules['fastapi'] = None; sys.argv[1:] = ['serve', 'x']; from tinylmm.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "`tinylmm serve` needs fastapi: pip install 'tinylmm[serve]'\n")


def mixed_cases(model: ChatModel) -> list[tuple[dict[str, Any], str]]:
    """Requests of different lengths about different pictures, each with the answer that it has alone."""
    draw = random.Random(1)
    pictures = [Image.new("RGB", (20 + n, 30), (n * 40, 0, 255 - n * 40)) for n in range(6)]
    cases = []
    for number in range(30):
        text = f"Question {number} what is it?"[: draw.randint(8, 24)]
        images = [draw.choice(pictures) for _ in range(draw.randint(0, 2))]
        length = draw.randint(1, 40)
        body = {"messages": [user(*map(picture, images), words(text))], "max_tokens": length}
        cases.append((body, model.chat(text, images, max_new_tokens=length)))
    return cases


def test_a_crowd_that_comes_and_goes_gets_right_answers_under_tight_limits(tmp_path: Path) -> None:
    folder = wide_model(tmp_path / "tiny")
    cases = mixed_cases(tinylmm.load(folder, device="cpu"))
    limits = ("--rows", "4", "--queue", "6", "--kept-tokens", "400", "--kept-images", "2", "--tokens", "600")
    with serving(folder, *limits) as server:

        def client(seed: int) -> int:
            own, answered = random.Random(seed), 0
            for _ in range(25):
                body, expected = own.choice(cases)
                connection = http.client.HTTPConnection(*server.address, timeout=300)
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                if own.random() < 0.2:
                    time.sleep(own.random() * 0.03)
                else:
                    reply = connection.getresponse()
                    found = json.loads(reply.read())
                    assert reply.status in (200, 429), found
                    if reply.status == 200:
                        assert found["choices"][0]["message"]["content"] == expected
                        answered += 1
                connection.close()
            return answered

        with ThreadPoolExecutor(14) as pool:
            assert sum(pool.map(client, range(14))) > 14
        for name in (RUNNING, WAITING):
            server.wait_for(name, 0)
        code, errors = server.end()
        assert (code, "Traceback" in errors) == (0, False), errors


@pytest.mark.slow
def test_sixty_four_clients_at_once_for_a_minute_lose_and_mix_nothing(tmp_path: Path) -> None:
    """Every one goes on asking the moment it is answered; whoever is refused for the full queue asks again."""
    folder = wide_model(tmp_path / "tiny")
    cases = mixed_cases(tinylmm.load(folder, device="cpu"))
    with serving(folder, "--queue", "48") as server:
        end = time.monotonic() + 60

        def client(seed: int) -> tuple[int, int]:
            own, answered, refused = random.Random(seed), 0, 0
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as asking:
                while time.monotonic() < end:
                    body, expected = own.choice(cases)
                    try:
                        reply = asking.chat.completions.create(model="tiny", **body)
                    except openai.RateLimitError:
                        refused += 1
                        time.sleep(own.random() * 0.2)
                        continue
                    assert reply.choices[0].message.content == expected
                    answered += 1
            return answered, refused

        with ThreadPoolExecutor(64) as pool:
            counts = list(pool.map(client, range(64)))
        for name in (RUNNING, WAITING):
            server.wait_for(name, 0)
        told = server.metrics()
        path = 'tinylmm_requests_total{path="/v1/chat/completions",status='
        assert told[f'{path}"200"}}'] == sum(answered for answered, _ in counts)
        assert told.get(f'{path}"429"}}', 0) == sum(refused for _, refused in counts)
        assert all(answered for answered, _ in counts), "somebody was never answered"
        code, errors = server.end()
        assert (code, "Traceback" in errors) == (0, False), errors
