"""What OpenAI's own client gets from a real server is what the model says alone."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import tinylmm
from tests.unit.serving.process import BLUE, RED, N, Server, picture, serving, uri, user, wide_model, words
from tinylmm.generation.session import ChatModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return tinylmm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


def ask(server: Server, messages: list[dict[str, Any]], **options: Any) -> Any:
    return server.openai.chat.completions.create(
        **{"model": "tiny", "messages": messages, "max_tokens": N} | options  # type: ignore[arg-type]
    )


def text(server: Server, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(ask(server, messages, **options).choices[0].message.content)


def test_every_form_of_a_conversation_gets_the_models_own_answer(server: Server, model: ChatModel) -> None:
    system = [{"role": "system", "content": "Say no."}]
    past = [user(picture(RED), words("What is it?")), {"role": "assistant", "content": "a red 3"}]
    developer = {"role": "developer", "content": [words("Say no.")]}
    two = "Is <image> or <image> red?"
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([user("Who are you?")], model.chat("Who are you?", max_new_tokens=N)),
        ([user(words("Who are"), words("you?"))], model.chat("Who are\nyou?", max_new_tokens=N)),
        ([user(picture(RED), words("What is it?"))], model.chat("What is it?", RED, max_new_tokens=N)),
        ([user(words("What is it?"), picture(RED, as_text=True))], model.chat("What is it?", RED, max_new_tokens=N)),
        ([user(picture(RED), picture(BLUE), words("Why?"))], model.chat("Why?", [RED, BLUE], max_new_tokens=N)),
        ([user(words(two), picture(BLUE), picture(RED))], model.chat(two, [BLUE, RED], max_new_tokens=N)),
        ([user(picture(RED), picture(BLUE), words(" Why? "))], model.chat("Why?", [RED, BLUE], max_new_tokens=N)),
        ([user(picture(RED), picture(BLUE))], model.chat("", [RED, BLUE], max_new_tokens=N)),
        ([user(picture(RED), words(" What is it? "))], model.chat("What is it?", RED, max_new_tokens=N)),
        ([user(" Who? ")], model.chat("Who?", max_new_tokens=N)),
        ([*past, user("Sure?")], model.chat("Sure?", history=past, max_new_tokens=N)),
        ([*past, user(picture(BLUE), words("And?"))], model.chat("And?", BLUE, history=past, max_new_tokens=N)),
        ([*system, user("Who?")], model.chat("Who?", history=system, max_new_tokens=N)),
        ([*system, *past, user("Sure?")], model.chat("Sure?", history=[*system, *past], max_new_tokens=N)),
    ]
    assert text(server, [developer, user("Who?")]) == cases[-2][1]
    between = [words("Is "), picture(RED), words(" or "), picture(BLUE), words("red? ")]
    expected = model.chat("Is\n<image>\nor\n<image>\nred?", [RED, BLUE], max_new_tokens=N)
    assert text(server, [user(*between)]) == expected
    assert len({answer for _, answer in cases}) > len(cases) - 5
    for messages, answer in cases:
        assert text(server, messages) == answer
        chunks = list(ask(server, messages, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == answer and len(pieces) > 3


def test_many_at_once_are_each_answered_as_alone(server: Server, model: ChatModel) -> None:
    draw = random.Random(0)
    images = [None, RED, BLUE]
    asked = [
        (f"{draw.choice(['What', 'Who', 'Why', 'Is it red'])} {n % 7}?", images[n % 3], draw.randint(1, N))
        for n in range(48)
    ]
    expected = [model.chat(question, image, max_new_tokens=length) for question, image, length in asked]

    def one(case: tuple[str, Any, int]) -> str:
        question, image, length = case
        parts = [words(question)] if image is None else [picture(image), words(question)]
        if len(question) % 2:
            stream = ask(server, [user(*parts)], max_tokens=length, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return text(server, [user(*parts)], max_tokens=length)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, asked)) == expected


def test_draws_follow_their_seed_whoever_else_asks(server: Server, model: ChatModel) -> None:
    options = {"temperature": 1.5, "top_p": 0.95}
    seeds = list(range(12))
    expected = [model.chat("Who are you?", max_new_tokens=N, seed=seed, **options) for seed in seeds]
    assert len(set(expected)) > 6

    def one(seed: int) -> str:
        return text(server, [user("Who are you?")], seed=seed, **options)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, seeds)) == expected
    several = ask(server, [user("Who are you?")], seed=3, n=4, **options)
    assert [choice.message.content for choice in several.choices] == expected[3:7]
    assert several.usage.completion_tokens <= 4 * N
    streamed = ["", "", "", ""]
    for chunk in ask(server, [user("Who are you?")], seed=3, n=4, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected[3:7]
    unseeded = {text(server, [user("Who are you?")], **options) for _ in range(4)}
    assert len(unseeded) > 1
    ours = {"extra_body": {"top_k": 1, "repetition_penalty": 3.0}, "temperature": 2.0}
    assert text(server, [user("Who?")], **ours) == model.chat(
        "Who?", top_k=1, repetition_penalty=3.0, temperature=2.0, max_new_tokens=N
    )


def test_an_answer_ends_at_a_stop_at_its_limit_and_at_its_end(server: Server, model: ChatModel) -> None:
    whole = model.chat("Who are you?", max_new_tokens=N)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    before = whole[: whole.index(stop)].strip()
    for stops in (stop, ["not there", stop]):
        reply = ask(server, [user("Who are you?")], stop=stops)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (before, "stop")
        chunks = list(ask(server, [user("Who are you?")], stop=stops, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    short = ask(server, [user("Who are you?")], max_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    newer = ask(server, [user("Who are you?")], max_tokens=9, max_completion_tokens=2)
    assert newer.usage.completion_tokens == 2


def test_usage_counts_images_and_what_was_not_computed_again(server: Server, model: ChatModel) -> None:
    messages = [user(picture(BLUE), picture(BLUE), words("How many are there in this picture?"))]
    first, second = ask(server, messages), ask(server, messages)
    assert first.choices[0].message.content == second.choices[0].message.content
    usage = second.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == 2 * model.model.image_tokens
    assert details["cached_tokens"] == usage.prompt_tokens - 1
    turns = [*messages, {"role": "assistant", "content": first.choices[0].message.content}, user("Sure?")]
    third = ask(server, turns)
    assert third.usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens
    history = [*messages, {"role": "assistant", "content": first.choices[0].message.content}]
    assert third.choices[0].message.content == model.chat("Sure?", history=history, max_new_tokens=N)
    *_, last = ask(server, messages, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.total_tokens == usage.total_tokens


def test_log_probabilities_come_with_the_text_they_belong_to(server: Server, model: ChatModel) -> None:
    reply = ask(server, [user("Who are you?")], logprobs=True, top_logprobs=3)
    told = reply.choices[0].logprobs.content
    assert len(told) == reply.usage.completion_tokens
    for token in told:
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs), abs=1e-6)  # greedy
        assert len(token.top_logprobs) == 3 and token.token == token.top_logprobs[0].token
    special = set(model.tokenizer.all_special_tokens)
    spoken = "".join(token.token for token in told if token.token not in special)
    assert spoken.strip() == reply.choices[0].message.content
    chunks = ask(server, [user("Who are you?")], logprobs=True, top_logprobs=3, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert [token.token for token in streamed] == [token.token for token in told]
    bare = ask(server, [user("Who are you?")], logprobs=True)
    assert all(token.top_logprobs == [] for token in bare.choices[0].logprobs.content)
    assert ask(server, [user("Who are you?")]).choices[0].logprobs is None


def test_the_model_is_listed_health_is_told_and_metrics_count(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinylmm"
    ask(server, [user("Who?")])
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        assert reply.read() == b'{"status":"ok"}'
    counts = server.metrics()
    assert counts['tinylmm_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert counts["tinylmm_new_tokens_total"] > 0 and counts["tinylmm_answers_running"] == 0
    assert counts["tinylmm_request_seconds_count"] >= 1


def test_responses_say_the_same_whole_and_streamed(server: Server, model: ChatModel) -> None:
    seen = [{"type": "input_image", "image_url": uri(RED)}, {"type": "input_text", "text": "What is it?"}]
    history = [{"role": "system", "content": "Say no."}, user(picture(RED), words("What is it?"))]
    past = [*history, {"role": "assistant", "content": "a red 3"}]
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a red 3"}]}
    turns = [{"role": "user", "content": seen}, said, {"role": "user", "content": "Sure?"}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": "Who are you?"}, model.chat("Who are you?", max_new_tokens=N)),
        ({"input": [{"role": "user", "content": seen}]}, model.chat("What is it?", RED, max_new_tokens=N)),
        ({"input": turns, "instructions": "Say no."}, model.chat("Sure?", history=past, max_new_tokens=N)),
    ]
    for asked, answer in cases:
        whole = server.openai.responses.create(model="tiny", max_output_tokens=N, **asked)
        assert whole.output_text == answer and whole.usage.output_tokens <= N
        assert whole.status == ("incomplete" if whole.usage.output_tokens == N else "completed")
        events = list(server.openai.responses.create(model="tiny", max_output_tokens=N, stream=True, **asked))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == answer and len(deltas) > 3
        assert events[-1].type == f"response.{whole.status}" and events[-1].response.output_text == answer
        assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input": "Go on", "previous_response_id": "resp_1"}, "previous_response_id is not supported; leave it out."),
        ({"input": [{"type": "reasoning", "summary": []}]}, "messages alone are supported"),
        ({"input": []}, "input must end with a user's message"),
        ({"input": "Hi", "text": {"format": {"type": "json_object"}}}, "text is not supported"),
    ],
)
def test_what_responses_do_not_have_is_refused(server: Server, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.openai.responses.create(model="tiny", **asked)


def test_the_documentations_own_example_runs(server: Server, model: ChatModel, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python title=ask.py\n(.*?)^```", page, re.M | re.S)
    [command] = re.findall(r"^\$ (curl .*?)$", page, re.M)
    RED.save(tmp_path / "scene.png")

    def run(*words: str) -> str:
        return subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=120, check=True).stdout.decode()

    said = run(sys.executable, "-c", example.replace("http://127.0.0.1:8000", server.url))
    assert (
        said.startswith(model.chat("How many digits are there?", tmp_path / "scene.png")) and "CompletionUsage(" in said
    )
    lines = run("bash", "-c", command.replace("http://127.0.0.1:8000", server.url)).split("\n\n")
    assert lines[-2] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["model"] == "tiny"
