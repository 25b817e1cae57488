"""A conversation with two models at once: each answers as it does alone, stops when it is told to, and forgets no turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import tinylmm
from tests.unit.serving.process import BLUE, RED, endless_model, wide_model
from tinylmm.demo.talk import Talk
from tinylmm.errors import UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.inputs import Exchange
from tinylmm.generation.session import ChatModel
from tinylmm.serving.errors import ApiError
from tinylmm.serving.options import ServeOptions
from tinylmm.serving.service import Service

SHORT, ENDLESS = Sampling(max_new_tokens=6), Sampling(max_new_tokens=12_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ChatModel]:
    """One whose answers end early or not, and one whose answers end at their limit alone."""
    folder = tmp_path_factory.mktemp("models")
    return [tinylmm.load(make(folder / make.__name__), device="cpu") for make in (wide_model, endless_model)]


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    for name, image in {"red": RED, "blue": BLUE}.items():
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "red.png").read_bytes()[:-40])
    return {path.stem: path for path in tmp_path.glob("*.png")}


def talked(models: list[ChatModel], work: Callable[[Talk, list[Service]], Awaitable[None]], **limits: Any) -> None:
    """Do something with a new conversation, and see that nothing of it goes on."""
    services = [Service(model, f"model {i}", ServeOptions(**limits)) for i, model in enumerate(models)]

    async def whole() -> None:
        for service in services:
            service.start()
        try:
            await work(Talk(), services)
            while any(service.worker.engine.busy for service in services):
                await asyncio.sleep(0.01)
            assert all(service._taken == 0 for service in services)
        finally:
            for service in services:
                service.close()

    asyncio.run(asyncio.wait_for(whole(), 240))


async def ask(talk: Talk, services: list[Service], *given: Any) -> None:
    async for _ in talk.ask(services, *given):
        pass


def test_every_model_answers_as_alone_with_its_own_answers_behind_it(
    models: list[ChatModel], pictures: dict[str, Path]
) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        await ask(talk, services, "What are they?", [pictures["red"], pictures["blue"]], SHORT)
        await ask(talk, services, "Which is it?", [pictures["blue"]], SHORT)
        await ask(talk, services, "Why?", [], SHORT)
        for number, model in enumerate(models):
            past: list[Exchange] = []
            for turn in talk.turns:
                expected = "".join(model.stream(turn.question, list(turn.images), past, max_new_tokens=6))
                past.append(Exchange(turn.question, expected, turn.images))
                reply = turn.replies[number]
                assert (reply.text, reply.image_tokens) == (expected, 4 * sum(len(e.images) for e in past))
                assert reply.ending in ("stop", "length") and 0 < reply.tokens <= 6
        assert talk.turns[0].replies[1].text != talk.turns[1].replies[1].text
        last = talk.turns[2].replies[1]
        assert last.cached_tokens and last.first is not None and last.rate and last.seconds > last.first

    talked(models, work)


def test_stop_ends_the_computation_and_what_was_said_stands(models: list[ChatModel]) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        async for _ in talk.ask(services, "Who?", [], ENDLESS):
            if talk.turns[-1].replies[0].tokens > 3:
                talk.stop()
        [turn] = talk.turns
        [reply] = turn.replies
        assert reply.ending == "stopped" and reply.text and reply.tokens < ENDLESS.max_new_tokens
        assert not talk.busy
        await ask(talk, services, "Why?", [], SHORT)
        expected = models[1].stream("Why?", None, [Exchange("Who?", reply.text)], max_new_tokens=6)
        assert talk.turns[1].replies[0].text == "".join(expected)

    talked(models[1:], work)


@pytest.mark.parametrize("how", ["leave", "clear"])
def test_who_leaves_or_begins_anew_ends_the_computation(models: list[ChatModel], how: str) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        asking = talk.ask(services, "Who?", [], ENDLESS)
        async for _ in asking:
            if talk.turns and talk.turns[-1].replies[0].tokens:
                if how == "leave":
                    break
                talk.clear()
        await asking.aclose()
        assert talk.turns == [] or how == "leave"

    talked(models[1:], work)


def test_what_cannot_be_asked_leaves_no_trace(models: list[ChatModel], pictures: dict[str, Path]) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        for given, error, words in [
            (("What is it?", [pictures["damaged"]], SHORT), ApiError, "damaged or cut short"),
            (("<image> and <image>?", [pictures["red"]], SHORT), ApiError, "2 `<image>` slots, but 1 images"),
            (("What are they?", [pictures["red"]] * 3, SHORT), ApiError, "takes 2 at most"),
            (("what is it " * 200, [], SHORT), ApiError, "the model reads 256 at most"),
            ((" ", [], SHORT), UserError, "Type a question"),
        ]:
            with pytest.raises(error, match=words):
                await ask(talk, services, *given)
            assert talk.turns == [] and not talk.busy
        await ask(talk, services, "What is it?", [pictures["red"]], SHORT)
        assert talk.turns[0].replies[0].text

    talked(models[:1], work, max_images=2)


def test_one_question_at_a_time_is_asked_in_a_conversation(models: list[ChatModel]) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        first = talk.ask(services, "Who?", [], ENDLESS)
        await anext(first)
        with pytest.raises(UserError, match="still being written"):
            await ask(talk, services, "Why?", [], SHORT)
        assert talk.busy
        await first.aclose()

    talked(models[1:], work)


def test_two_conversations_are_answered_at_once(models: list[ChatModel]) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        others = [Talk() for _ in range(5)]
        await asyncio.gather(*[ask(one, services, f"Who is {i}?", [], SHORT) for i, one in enumerate(others)])
        for number, one in enumerate(others):
            assert one.turns[0].replies[0].text == "".join(models[1].stream(f"Who is {number}?", max_new_tokens=6))

    talked(models[1:], work, rows=3)


def test_an_upload_that_is_gone_is_told_in_a_sentence(models: list[ChatModel], pictures: dict[str, Path]) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        await ask(talk, services, "What is it?", [pictures["red"]], SHORT)
        pictures["red"].unlink()
        with pytest.raises(UserError, match="no longer there"):
            await ask(talk, services, "And now?", [], SHORT)
        assert len(talk.turns) == 1 and not talk.busy

    talked(models[:1], work)


def test_an_answer_that_fails_says_so_and_the_next_one_is_asked(
    models: list[ChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(talk: Talk, services: list[Service]) -> None:
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(services[0].worker.engine, "_embed", lambda *_: 1 / 0)
            async for _ in talk.ask(services, "Who?", [], SHORT):
                seen += [(reply.ending, reply.problem) for turn in talk.turns for reply in turn.replies]
        assert seen[-1] == ("failed", "the server could not answer; its log says why.")
        assert talk.turns == [] and not talk.busy
        await ask(talk, services, "Who?", [], SHORT)
        assert talk.turns[0].replies[0].text

    talked(models[:1], work)
