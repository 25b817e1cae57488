"""Rows that come and go at any time say what each of them says alone, whatever they share."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.builders import redescribe, tiny_loaded
from tests.unit.generation.test_engine import ENDS, FAMILIES, GREEDY, NEW, ask, model_of, pixels, reference
from tinylmm.generation import choose, questions
from tinylmm.generation import continuous as continuous_module
from tinylmm.generation.choose import Sampling
from tinylmm.generation.continuous import ContinuousEngine
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt
from tinylmm.generation.questions import End, Event, Question, Token
from tinylmm.generation.session import ChatModel
from tinylmm.models.anyres import with_tiles
from tinylmm.models.lmm import LMM

LOTS = 10**5


def continuous(model: LMM, rows: int = 8, tokens: int = LOTS, kept: int = LOTS) -> ContinuousEngine:
    return ContinuousEngine(model, ENDS, rows, tokens, kept)


class Asked:
    """A question with what came back."""

    def __init__(self, prompt: Prompt, sampling: Sampling = GREEDY, **more: Any) -> None:
        self.events: list[Event] = []
        sizes = dict.fromkeys(prompt.images, (16, 16))
        self.question = Question(prompt, sampling, pixels, sizes, self.events.append, **more)

    @property
    def ids(self) -> list[int]:
        assert isinstance(self.events[-1], End), self.events
        return [event.id for event in self.events if isinstance(event, Token)]


def answer(engine: ContinuousEngine, asked: list[Asked], every: int = 0) -> None:
    """Ask all at once, or one after every so many ticks."""
    for one in asked:
        engine.ask(one.question)
        for _ in range(every):
            engine.tick()
    while engine.busy:
        engine.tick()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_generation_however_rows_come_and_go(family: str) -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES[family]())
    prompts = ask(model)
    expected = [reference(model, prompt) for prompt in prompts]
    for rows, kept, every in ((1, LOTS, 0), (8, LOTS, 0), (3, LOTS, 1), (8, LOTS, 2), (64, 0, 0), (4, 40, 1)):
        engine = continuous(model, rows, kept=kept)
        asked = [Asked(prompt) for prompt in prompts]
        answer(engine, asked, every)
        assert [one.ids for one in asked] == expected, (rows, kept, every)
        assert engine.prefixes.tokens <= kept and engine.answering == 0
        if kept == LOTS:
            assert engine.images.encoded == 4


def test_what_was_computed_before_is_not_computed_again() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)[:13]  # about four images, one each
    engine = continuous(model, rows=64)
    asked = [Asked(prompt) for prompt in prompts]
    answer(engine, asked)
    behind = 5 + model.image_tokens
    assert (
        sum((one.question.cached or 0) < behind for one in asked) == 4
    )  # the first about each image; the others waited
    turn = Prompt("turn", (*prompts[0].ids, *asked[0].ids, 77, 78), prompts[0].images)
    second = Asked(turn)
    answer(engine, [second])
    assert second.question.cached == len(prompts[0].ids) + len(asked[0].ids) - (len(asked[0].ids) == NEW)
    assert second.ids == reference(model, turn)


def test_near_ties_are_settled_by_decoding_alone_and_nothing_is_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    expected = [reference(model, prompt) for prompt in prompts]
    real, calls = choose.Chooser.__call__, iter(range(LOTS))

    def doubtful(self: Any, *given: Any) -> Any:
        tokens, doubts = real(self, *given)
        doubt = self._doubts and next(calls) % 4 == 3
        return tokens, [doubt] * len(doubts)

    monkeypatch.setattr(choose.Chooser, "__call__", doubtful)
    engine = continuous(model, rows=3)
    asked = [Asked(prompt) for prompt in prompts]
    answer(engine, asked)
    assert [one.ids for one in asked] == expected and engine.counts.near_ties > 3


def test_draws_and_limits_are_each_rows_own() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    samplings = [
        Sampling(max_new_tokens=1 + n % NEW, temperature=float(n % 3), top_p=0.9, repetition_penalty=1 + n % 2, seed=n)
        for n in range(len(prompts))
    ]
    asked = [Asked(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    answer(continuous(model), asked, every=1)
    for prompt, sampling, one in zip(prompts, samplings, asked, strict=True):
        [[alone]] = Engine(model, pixels, ENDS, sampling).replies([prompt])
        assert one.ids == alone.ids
        reason = "length" if len(alone.ids) == sampling.max_new_tokens else "stop"
        assert one.events[-1] == End(reason)


@pytest.mark.parametrize("why", ["its cache", "its window", "its length", "its attention"])
def test_models_that_cannot_take_rows_together_answer_one_by_one(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["gemma3 with a sliding window" if why == "its window" else "llama"]())
    prompts = ask(model)[:6]
    expected = [reference(model, prompt) for prompt in prompts]
    engine = continuous(model, rows=4)
    if why == "its cache":
        engine.kind = replace(engine.kind, shareable=False)
    if why == "its length":
        engine.kind = replace(engine.kind, long_from=9)
    if why == "its attention":
        monkeypatch.setattr(continuous_module, "MASKING", ())
    asked = [Asked(prompt) for prompt in prompts]
    answer(engine, asked)
    assert [one.ids for one in asked] == expected and engine.prefixes.tokens == 0


def test_a_batch_keeps_to_its_bound_of_tokens_and_one_question_always_fits() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    longest = max(len(prompt.ids) for prompt in prompts) + NEW
    engine = continuous(model, rows=64, tokens=3 * longest)
    asked = [Asked(prompt) for prompt in prompts]
    for one in asked:
        engine.ask(one.question)
    most = 0
    while engine.busy:
        engine.tick()
        most = max(most, engine.answering)
        assert engine.answering * max((q.cost for q in engine._running), default=0) <= 3 * longest
    assert most > 1
    tight = continuous(model, tokens=1)
    again = [Asked(prompt) for prompt in prompts[:3]]
    answer(tight, again)
    assert [one.ids for one in again] == [one.ids for one in asked[:3]]


def test_answers_that_grow_beyond_the_bound_wait_in_their_middle_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "AHEAD", 1)
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    samplings = [Sampling(max_new_tokens=30, temperature=float(n % 2), seed=n) for n in range(len(prompts))]
    expected = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        [[alone]] = Engine(model, pixels, ENDS, sampling).replies([prompt])
        expected.append(alone.ids)
    assert sum(len(ids) == 30 for ids in expected) > 5
    for kept in (LOTS, 0):
        engine = continuous(model, rows=8, tokens=120, kept=kept)
        asked = [Asked(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        for one in asked:
            engine.ask(one.question)
        while engine.busy:
            engine.tick()
            held = list(engine._cache.lengths)
            assert len(held) * max(held, default=0) <= 120 or len(held) == 1
        assert [one.ids for one in asked] == expected and engine.counts.put_back > 3
        assert engine.counts.prompt_tokens == sum(len(prompt.ids) for prompt in prompts)


def test_a_question_nobody_waits_for_leaves_between_two_tokens_and_the_others_go_on() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    asked = [Asked(prompt) for prompt in prompts]
    engine = continuous(model)
    for one in asked:
        engine.ask(one.question)
    engine.tick()
    engine.tick()
    gone = [asked[1], asked[-1]]
    said = [len(one.events) for one in gone]
    for one in gone:
        one.question.cancelled = True
    while engine.busy:
        engine.tick()
    assert [len(one.events) for one in gone] == said
    for prompt, one in zip(prompts, asked, strict=True):
        assert one in gone or one.ids == reference(model, prompt)


def test_what_fails_ends_the_questions_that_took_part_and_the_others_say_what_they_would_have_said() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)[:6]
    asked = [Asked(prompt) for prompt in prompts]
    broken = Asked(Prompt("broken", prompts[0].ids, ("9",)))
    broken.question.sizes["9"] = (16, 16)

    def fail(key: str) -> torch.Tensor:
        raise OSError("gone")

    broken.question.load = fail
    engine = continuous(model)
    for one in asked:
        engine.ask(one.question)
    engine.tick()
    engine.tick()
    engine.ask(broken.question)
    while engine.busy:
        engine.tick()
    assert [str(event) for event in broken.events] == ["gone"]
    assert [one.ids for one in asked] == [reference(model, prompt) for prompt in prompts]


def test_logits_that_are_not_finite_end_one_row_and_spare_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)[-6:-1]
    asked = [Asked(prompt) for prompt in prompts]
    engine = continuous(model)
    real = engine._cache.step

    def overflowing(*given: Any) -> torch.Tensor:
        logits = real(*given).clone()
        logits[1] = float("nan")
        return logits

    for one in asked:
        engine.ask(one.question)
    engine.tick()
    monkeypatch.setattr(engine._cache, "step", overflowing)
    victim = engine._running[1]
    engine.tick()
    monkeypatch.setattr(engine._cache, "step", real)
    while engine.busy:
        engine.tick()
    for prompt, one in zip(prompts, asked, strict=True):
        if one.question is victim:
            assert isinstance(one.events[-1], FloatingPointError)
        else:
            assert one.ids == reference(model, prompt)


def test_log_probabilities_are_those_of_the_models_own_distribution() -> None:
    model = model_of(FAMILIES["llama"]())
    prompt = ask(model)[-3]
    asked = Asked(prompt, Sampling(max_new_tokens=NEW, temperature=0.7, seed=3), alternatives=4)
    answer(continuous(model), [asked, Asked(ask(model)[0])])
    row = list(prompt.ids)
    for event in asked.events[:-1]:
        assert isinstance(event, Token) and event.log_probs is not None
        with torch.no_grad():
            known = model.llm(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        assert event.log_probs.chosen == pytest.approx(float(known[event.id]), abs=1e-4)
        assert [token for token, _ in event.log_probs.top] == known.topk(4).indices.tolist()
        row.append(event.id)


def test_closing_tells_everybody_who_waits() -> None:
    model = model_of(FAMILIES["llama"]())
    asked = [Asked(prompt) for prompt in ask(model)]
    engine = continuous(model, rows=2)
    for one in asked:
        engine.ask(one.question)
    engine.tick()
    engine.close(RuntimeError("closing"))
    assert all(isinstance(one.events[-1], RuntimeError) for one in asked) and not engine.busy


def test_a_random_day_of_turns_over_shared_images_is_answered_as_alone() -> None:
    model = model_of(FAMILIES["qwen2"]())
    draw = random.Random(5)
    engine = continuous(model, rows=4, kept=150)
    asked: list[Asked] = []
    for _ in range(40):
        done = [one for one in asked if isinstance(one.events[-1:][0] if one.events else None, End)]
        if done and draw.random() < 0.5:
            before = draw.choice(done)
            ids = (*before.question.prompt.ids, *before.ids, draw.randrange(10, 300))
            prompt = Prompt("next", ids, before.question.prompt.images)
        else:
            prompt = draw.choice(ask(model))
        if len(prompt.ids) < 60:
            asked.append(Asked(prompt, replace(GREEDY, max_new_tokens=draw.randint(1, NEW))))
            engine.ask(asked[-1].question)
        for _ in range(draw.randrange(4)):
            engine.tick()
    while engine.busy:
        engine.tick()
    for one in asked:
        expected = reference(model, one.question.prompt)[: one.question.limit]
        assert one.ids == expected


def test_tiled_images_take_tokens_after_their_size() -> None:
    loaded = tiny_loaded()
    redescribe(loaded, image=loaded.description.as_json()["image"] | {"mode": "anyres", "tiles": [[1, 2], [2, 1]]})
    image = loaded.description.image
    loaded.model.connector = with_tiles(loaded.model.connector, image, loaded.model.vision_tower.num_tokens)
    chat = ChatModel(loaded)
    images = {"wide": Image.new("RGB", (40, 12), (0, 255, 0)), "red": Image.new("RGB", (20, 30), (255, 0, 0))}
    sizes = {key: image.size for key, image in images.items()}
    engine = ContinuousEngine(chat.model, chat.prompts.ends, 4, LOTS, LOTS)
    cases = [
        ("What is it?", ["wide", "red"]),
        ("Why?", ["wide", "red"]),
        ("Who?", []),
        ("What is it?", ["red", "wide"]),
    ]
    for _ in range(2):  # the second time from what is kept
        asked = []
        for text, keys in cases:
            prompt = chat.prompt("", [(text, keys)], [], None, sizes)
            one = Asked(prompt, Sampling(max_new_tokens=12))
            one.question.load, one.question.sizes = lambda key: chat.transform(images[key]), sizes
            asked.append(one)
        answer(engine, asked)
        for (text, keys), one in zip(cases, asked, strict=True):
            expected = chat.chat(text, [images[key] for key in keys], max_new_tokens=12)
            assert chat.prompts.text(one.ids).strip() == expected
    assert engine.images.encoded == 2


def test_a_narrow_type_answers_and_says_what_it_does_not_promise(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(FAMILIES["llama"]()).to(torch.bfloat16)  # type: ignore[arg-type]
    engine = continuous(model)
    asked = [Asked(prompt) for prompt in ask(model)]
    for one in asked:
        one.question.load = lambda key: pixels(key).bfloat16()
    answer(engine, asked)
    assert all(one.ids is not None for one in asked) and not engine.exact
    assert "bfloat16: who asks beside others may get another answer" in caplog.text
