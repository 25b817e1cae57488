"""Fixed shapes: the plain model's answers, the same bits beside any neighbours, and steps that a GPU can record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from tests.builders import LLAMA, WIDTH
from tests.unit.generation.test_engine import ENDS, FAMILIES, GREEDY, NEW, answers, ask, model_of, pixels, reference
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.generation import fixed, fixed_cache
from tinylmm.generation.cache import cache_kind
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.fixed import FixedDecoder
from tinylmm.generation.fixed_cache import IN_FIXED_ROOMS, Shape, attend
from tinylmm.generation.fixed_plan import Granules, Planner, begins
from tinylmm.generation.fixed_step import CHUNK, Rows, Task, fixed_attention
from tinylmm.generation.prompts import Prompt
from tinylmm.models.lmm import LMM

SMALL = Granules(groups=4, rows=2, columns=8)
CAPPED = {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}
ALL: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "gemma2 with capped scores": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, **CAPPED)),  # type: ignore[arg-type]
}


def decoder(model: LMM, tokens: int = 10**6, **more: Any) -> FixedDecoder:
    return FixedDecoder(model.llm, cache_kind(model.llm), ENDS, tokens, SMALL, **more)


def engine(model: LMM, rows: int, made: FixedDecoder | None = None, sampling: Sampling = GREEDY) -> Engine:
    return Engine(model, pixels, ENDS, sampling, rows=rows, fixed=made or decoder(model))


def asked(model: LMM) -> list[Prompt]:
    """Prompts that have something behind their images."""
    return [prompt for prompt in ask(model) if begins(prompt) < len(prompt.ids)]


@pytest.mark.parametrize("family", ALL)
def test_answers_are_those_of_plain_generation(family: str) -> None:
    torch.manual_seed(1)
    model = model_of(ALL[family]())
    before = model.config._attn_implementation
    prompts = asked(model)
    made = decoder(model)
    of_all = engine(model, 64, made)
    found = answers(of_all, prompts)
    assert made.refused is None and of_all.exact and len({tuple(ids) for ids in found.values()}) > 5
    assert found == {prompt.item_id: reference(model, prompt) for prompt in prompts}
    assert any(batch.shape.shared for batch in made.plan(prompts, lambda _: NEW, 64)[0])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["phi", "gemma3 with a sliding window", "openelm"])
def test_in_bf16_neither_neighbours_nor_batch_change_an_answer(family: str) -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES[family]()).to(torch.bfloat16)  # type: ignore[arg-type]
    prompts, made = asked(model), decoder(model)
    of_all = engine(model, 64, made)
    found = answers(of_all, prompts)
    assert of_all.exact and made.alike and made.refused is None
    assert answers(engine(model, 1), prompts) == found
    some = [prompts[n] for n in (17, 3, 11, 0)]  # other neighbours, at other places
    assert answers(engine(model, 3, made), some) == {prompt.item_id: found[prompt.item_id] for prompt in some}


def test_long_prompts_are_read_in_chunks_and_answers_keep_their_limits() -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES["llama"]())
    long = tuple(10 + n % 200 for n in range(2 * CHUNK + 5))
    prompts = [Prompt(str(n), long[: CHUNK * n or 1], limit=1 + 3 * n) for n in range(3)]
    prompts += [Prompt("long", (5, *(IMAGE_TOKEN_ID,) * model.image_tokens, *long), ("0",), limit=4)]
    found = answers(engine(model, 64), prompts)
    assert found == {prompt.item_id: reference(model, prompt)[: prompt.limit] for prompt in prompts}


def test_near_ties_are_settled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    monkeypatch.setattr("tinylmm.generation.fixed_step.TIE", {torch.float32: 10.0})
    prompts = asked(model)
    of_all = engine(model, 64)
    found = answers(of_all, prompts)
    assert of_all.near_ties == len(prompts)
    assert found == {prompt.item_id: reference(model, prompt) for prompt in prompts}


def test_what_has_no_fixed_shape_is_answered_as_before() -> None:
    """Prompts that end with their image, that take more places than there are, and drawn tokens."""
    torch.manual_seed(1)
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    few = decoder(model, tokens=2 * (CHUNK + 20))
    assert {few.planner.shape_for(prompt, NEW) is None for prompt in prompts} == {True, False}
    found = answers(engine(model, 64, few), prompts)
    assert found == {prompt.item_id: reference(model, prompt) for prompt in prompts}
    none = decoder(model)
    drawn = Sampling(max_new_tokens=3, temperature=1.0)
    assert answers(engine(model, 64, none, drawn), prompts) == answers(
        Engine(model, pixels, ENDS, drawn, rows=64), prompts
    )
    assert not none.steps()


def test_a_model_that_computes_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES["llama"]())
    prompts = asked(model)
    expected = {prompt.item_id: reference(model, prompt) for prompt in prompts}
    real = fixed_cache.attend
    monkeypatch.setattr(fixed_cache, "attend", lambda q, k, v, bias, *more: real(q, k, v, None, *more))
    made = decoder(model)
    assert answers(engine(model, 64, made), prompts) == expected
    assert "not decoded in fixed shapes: its logits differ" in caplog.text and made.refused
    caplog.clear()

    def broken(*_: object) -> Tensor:
        raise TypeError("no such keys")

    monkeypatch.setattr(fixed_cache, "attend", broken)
    assert answers(engine(model, 64), prompts) == expected
    assert "TypeError: no such keys" in caplog.text
    caplog.clear()
    narrow = engine(model.to(torch.bfloat16), 64)  # type: ignore[arg-type]
    answers(narrow, prompts)
    assert not narrow.exact and caplog.text.count("answers may differ") == 1


def test_rows_whose_bits_differ_take_the_promise_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(FAMILIES["phi"]()).to(torch.bfloat16)  # type: ignore[arg-type]
    real = fixed_cache.attend

    def uneven(query: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        mixed, total = real(query, *more)
        mixed[-1] *= 1.01
        return mixed, total

    monkeypatch.setattr(fixed_cache, "attend", uneven)
    of_all = engine(model, 64)
    answers(of_all, asked(model))
    assert not of_all.exact and "differ in their last bits" in caplog.text


def test_a_recording_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(FAMILIES["llama"]())
    made = decoder(model, record=True)
    prompts = asked(model)
    assert answers(engine(model, 64, made), prompts) == {p.item_id: reference(model, p) for p in prompts}
    assert "not recorded as a CUDA graph, and slower for it: step 'read': a CPU records nothing" in caplog.text
    assert made.unrecorded


def test_damaged_weights_are_an_error_and_no_answer() -> None:
    model = model_of(FAMILIES["llama"]())
    with torch.no_grad():
        model.llm.get_output_embeddings().weight[4] = float("nan")  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match="not finite"):
        answers(engine(model, 64), asked(model))


class _Seen(TorchDispatchMode):
    """Records operations with the shapes they get, and refuses to let the host ask for a value."""

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.HOST, f"a step makes the host wait: {name}"
        shapes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))
        self.operations.append((name, shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["phi", "gemma3 with a sliding window", "openelm"])
def test_every_step_is_the_same_operations_on_the_same_shapes_and_never_waits(family: str) -> None:
    """What a CUDA graph needs, seen without a GPU: a recording of any step is a recording of all."""
    model = model_of(FAMILIES[family]())
    rows = Rows(model.llm, Shape(2, 2, 4, 64), sorted(ENDS))
    prefix = fixed.prefill_whole(model.llm, torch.randn(1, 6, WIDTH))
    rows.cache.load(slice(0, 2), prefix)
    with fixed_attention(model.llm):
        for _ in rows.begin([Task(2, range(10, 15), 4), None, Task(2, range(10, 60), 4), Task(2, range(7, 9), 1)]):
            pass
        seen = []
        for _ in range(4):
            with _Seen() as watched:
                rows.say()
            seen.append(watched.operations)
    assert len(seen[0]) > 50 and all(operations == seen[0] for operations in seen)
    assert not bool(rows.live.any())


def test_both_parts_of_a_softmax_are_that_of_the_whole() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    whole, total = attend(q, k, v, None, 0.3, 4.0)
    parts = [attend(q, k[:, :, some], v[:, :, some], None, 0.3, 4.0) for some in (slice(0, 12), slice(12, 20))]
    weight = torch.sigmoid(parts[1][1] - parts[0][1])[..., None]
    torch.testing.assert_close(torch.lerp(parts[0][0], parts[1][0], weight), whole)
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), total)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(attend(q, k, v, None, 0.3, None)[0], plain)


def test_shapes_follow_from_a_prompt_and_the_room_alone() -> None:
    model = model_of(FAMILIES["llama"]())
    made = Planner(cache_kind(model.llm), 32768, Granules())
    prompt = Prompt("a", (*range(10, 40), *(IMAGE_TOKEN_ID,) * 729, *range(10, 40)), ("0",))
    shape = made.shape_for(prompt, 16)
    assert shape == Shape(16, 4, 704, 128) and shape.tokens <= 32768
    assert made.shape_for(prompt, 512) == Shape(8, 4, 704, 768)  # fewer groups, where long answers need room
    batches, rest = made.plan([replace(prompt, item_id=str(n)) for n in range(9)], lambda _: 16, 4)
    assert not rest and [[len(u.prompts) for u in batch.units] for batch in batches] == [[4], [4], [1]]
    assert {batch.shape for batch in batches} == {shape}


def test_attention_is_known_to_transformers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert IN_FIXED_ROOMS in ALL_ATTENTION_FUNCTIONS
