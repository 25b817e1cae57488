"""The engine's promises: the same tokens in any batch, with and without shared prefixes; each image encoded once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.builders import IMAGE_SIZE, LLAMA, VOCAB, WIDTH, tiny_lmm, tiny_tower
from tests.reference import generate
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.errors import StoppedError
from tinylmm.generation import cache, choose, decode
from tinylmm.generation import engine as generation
from tinylmm.generation.cache import cache_kind
from tinylmm.generation.choose import TIE, Chooser, Sampling
from tinylmm.generation.decode import Continued, decode_alone
from tinylmm.generation.engine import Engine, Reply
from tinylmm.generation.packed import PackedRows, decode_packed
from tinylmm.generation.prompts import Prompt
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig

ENDS = frozenset({1})
NEW = 7
GREEDY = Sampling(max_new_tokens=NEW)
SYSTEM = (5, 6, 7, 8, 9)
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
OPENELM = {"vocab_size": VOCAB, "model_dim": WIDTH, "num_transformer_layers": 2, "head_dim": 8, "ffn_dim_divisor": 8}
OPENELM |= {"num_gqa_groups": 2, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0]}  # type: ignore[dict-item]
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_lmm().llm,  # type: ignore[return-value, dict-item]
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**LLAMA)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**LLAMA, head_dim=8)),
    "gemma3 with a sliding window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA, head_dim=8, **SLIDING)),
    "openelm": lambda: OpenELMForCausalLM(OpenELMConfig(**OPENELM)),  # type: ignore[arg-type]
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**LLAMA)),
}


def model_of(llm: PreTrainedModel) -> LMM:
    tower = tiny_tower()
    with torch.no_grad():
        for parameter in llm.parameters():  # wide enough that answers differ and some end early
            parameter.mul_(3)
    return LMM(llm, tower, MLPConnector(tower.hidden_size, WIDTH), "llama").eval()


def pixels(key: str) -> Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(int(key)))


def ask(model: LMM, seed: int = 0) -> list[Prompt]:
    """Questions of many lengths about four images, about two images at once, and about none."""
    draw = random.Random(seed)

    def words(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, VOCAB) for _ in range(draw.randint(1, most)))

    slot = (IMAGE_TOKEN_ID,) * model.image_tokens
    prompts = [Prompt(f"one-{n}", SYSTEM + slot + words(12), (str(n % 4),)) for n in range(13)]
    prompts += [Prompt(f"two-{n}", SYSTEM + slot + slot + words(5), ("2", str(n))) for n in (1, 3)]
    prompts += [Prompt(f"none-{n}", SYSTEM + words(9)) for n in range(5)]
    return [*prompts, Prompt("bare", slot, ("0",))]


def answers(engine: Engine, prompts: list[Prompt]) -> dict[str, list[int]]:
    found = [reply for batch in engine.replies(prompts) for reply in batch]
    assert Counter(reply.item_id for reply in found) == Counter(prompt.item_id for prompt in prompts)
    return {reply.item_id: reply.ids for reply in found}


def reference(model: LMM, prompt: Prompt) -> list[int]:
    """What transformers' own greedy generation says to one prompt, alone."""
    features = model.tower_features(torch.stack([pixels(key) for key in prompt.images])) if prompt.images else None
    return generate(model, [list(prompt.ids)], features, NEW, 1, 3)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_generation_in_any_batch_with_and_without_sharing(family: str) -> None:
    torch.manual_seed(1)
    model = model_of(FAMILIES[family]())
    prompts = ask(model)
    expected = {prompt.item_id: reference(model, prompt) for prompt in prompts}
    assert len({tuple(ids) for ids in expected.values()}) > 5  # the model does say different things
    for rows, tokens, share in (
        (1, 10**6, True),
        (3, 10**6, True),
        (64, 10**6, True),
        (64, 60, True),
        (8, 10**6, False),
    ):
        engine = Engine(model, pixels, ENDS, GREEDY, rows=rows, tokens=tokens, share=share)
        assert answers(engine, prompts) == expected, (rows, tokens, share)
        assert engine.images_encoded == 4


def test_an_order_of_prompts_does_not_change_answers() -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    first = answers(Engine(model, pixels, ENDS, GREEDY), prompts)
    assert answers(Engine(model, pixels, ENDS, GREEDY), prompts[::-1]) == first


def test_near_ties_are_settled_by_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    expected = answers(Engine(model, pixels, ENDS, GREEDY), prompts)
    plain = decode_batch_calls(monkeypatch)
    monkeypatch.setitem(choose.TIE, torch.float32, 10.0)  # every lead is now a near-tie
    engine = Engine(model, pixels, ENDS, GREEDY)
    replies: list[Reply] = [reply for batch in engine.replies(prompts) for reply in batch]
    assert plain  # batches were tried first
    assert engine.near_ties == len(prompts) and all(reply.alone for reply in replies)
    assert {reply.item_id: reply.ids for reply in replies} == expected


def decode_batch_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the rows of every batch."""
    rows: list[int] = []
    real = generation.decode

    def recorded(llm, start, *more):  # type: ignore[no-untyped-def]
        rows.append(len(start.embeddings))
        return real(llm, start, *more)

    monkeypatch.setattr(generation, "decode", recorded)
    return rows


def test_rounding_in_a_batch_stays_far_below_what_counts_as_a_near_tie() -> None:
    """The promise rests on this: the same row, alone and between padded others over a shared prefix, differs by rounding."""
    torch.manual_seed(3)
    model = model_of(FAMILIES["llama"]())
    rows = [torch.randn(1, 20 + n, WIDTH) for n in range(6)]
    past = rows[0][:, :12]
    with torch.no_grad():
        alone = [model.llm(inputs_embeds=torch.cat([past, row], 1)).logits[0, -1] for row in rows]
        kept = cache.select_rows(cache.prefill(model.llm, past), torch.zeros(6, dtype=torch.long))
        width = max(row.shape[1] for row in rows)
        padded = torch.stack([torch.cat([torch.zeros(width - row.shape[1], WIDTH), row[0]]) for row in rows])
        pads = torch.tensor([width - row.shape[1] for row in rows])[:, None]
        mask = torch.cat([torch.ones(6, 12), (torch.arange(width) >= pads).float()], 1).long()
        positions = 12 + (torch.arange(width) - pads).clamp(min=0)
        together = decode.next_logits(model.llm, {"inputs_embeds": padded}, mask, positions, kept)
    largest = torch.stack(alone).abs().amax(-1, keepdim=True)
    assert float(((together - torch.stack(alone)).abs() / largest).max()) < choose.TIE[torch.float32] / 10


def test_rounding_side_by_side_in_a_row_stays_as_far_below() -> None:
    torch.manual_seed(3)
    model = model_of(FAMILIES["llama"]())
    past, texts = torch.randn(1, 12, WIDTH), [[*range(20, 25 + n)] for n in range(6)]
    table = model.llm.get_input_embeddings()

    def embed(rows: Sequence[Sequence[int]]) -> Tensor:
        return table(torch.tensor(rows))

    with torch.no_grad():
        alone = [model.llm(inputs_embeds=torch.cat([past, embed([text])], 1)).logits[0, -1] for text in texts]
        two = cache.prefill(model.llm, past.repeat(2, 1, 1))
    found: list[Tensor] = []

    def choose(logits: Tensor, rows: Sequence[int], said: object) -> tuple[Tensor, list[bool]]:
        found.extend(logits[place] for place, row in enumerate(rows) if row >= 0)
        return logits.argmax(-1), [False] * len(rows)

    list(decode_packed(PackedRows(model.llm, two, 12, 2), [texts[:4], texts[4:]], embed, choose, ENDS, [1] * 6))
    largest = torch.stack(alone).abs().amax(-1, keepdim=True)
    assert len(found) == 6
    assert float(((torch.stack(found) - torch.stack(alone)).abs() / largest).max()) < TIE[torch.float32] / 10


def test_batches_keep_to_both_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    packed = packed_calls(monkeypatch)
    replies = list(Engine(model, pixels, ENDS, GREEDY, rows=5, tokens=10**6).replies(prompts))
    assert max(len(batch) for batch in replies) == 5
    assert {len(batch) for batch in replies} == {reply.rows for batch in replies for reply in batch}
    packed.clear()
    longest = max(len(prompt.ids) for prompt in prompts) + NEW
    replies = list(Engine(model, pixels, ENDS, GREEDY, rows=64, tokens=3 * longest).replies(prompts))
    assert max(map(len, replies)) > 1
    assert packed and max(packed) <= 3 * longest


def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places for tokens that each packed batch took in the cache in the end."""
    taken: list[int] = []
    real = generation.decode_packed

    def recorded(packed: PackedRows, *more: object) -> Iterator[list[Continued]]:
        taken.append(0)
        for found in real(packed, *more):  # type: ignore[arg-type]
            taken[-1] = max(taken[-1], packed.owner.numel())
            yield found

    monkeypatch.setattr(generation, "decode_packed", recorded)
    return taken


def test_questions_about_an_image_lie_side_by_side_and_leave_when_they_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row for all of them, whose columns are moved together when most have ended; answers are the reference's."""
    torch.manual_seed(1)
    model = model_of(FAMILIES["llama"]())
    slot = (IMAGE_TOKEN_ID,) * model.image_tokens
    prompts = [replace(prompt, images=("0",), limit=1 + 6 * (n > 10)) for n, prompt in enumerate(ask(model)[:13])]
    assert all(prompt.ids[len(SYSTEM) : len(SYSTEM) + len(slot)] == slot for prompt in prompts)
    widths: list[tuple[int, int]] = []
    real = PackedRows.step

    def recorded(packed: PackedRows, *more: object) -> Tensor:
        logits: Tensor = real(packed, *more)  # type: ignore[arg-type]
        widths.append((packed.rows, packed.owner.shape[1]))
        return logits

    monkeypatch.setattr(PackedRows, "step", recorded)
    found = answers(Engine(model, pixels, ENDS, GREEDY), prompts)
    assert found == {prompt.item_id: reference(model, prompt)[: prompt.limit] for prompt in prompts}
    assert {rows for rows, _ in widths} == {1} and widths[1][1] < widths[0][1] / 2


def test_only_models_whose_cache_can_be_shared_share_it(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(FAMILIES["llama"]())
    prompts = ask(model)
    expected = answers(Engine(model, pixels, ENDS, GREEDY), prompts)
    engine = Engine(model, pixels, ENDS, GREEDY)
    engine.kind = replace(engine.kind, shareable=False, why="the cache has layers of kind Odd")
    assert answers(engine, prompts) == expected
    assert "one by one: the cache has layers of kind Odd" in caplog.text
    sliding = cache_kind(FAMILIES["gemma3 with a sliding window"]())
    assert sliding.shareable and sliding.window == 8 and sliding.pads(7) and not sliding.pads(8)


def test_prompts_beyond_a_length_dependent_rotary_embedding_are_answered_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    stretched = model_of(LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=rope)))
    assert cache_kind(stretched.llm).long_from == 16
    prompts = ask(stretched)
    engine = Engine(stretched, pixels, ENDS, GREEDY)
    found = answers(engine, prompts[:4])
    assert "rotary embedding changes with the length" in caplog.text and engine.exact
    assert found == {prompt.item_id: reference(stretched, prompt) for prompt in prompts[:4]}


def test_a_narrow_type_promises_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(FAMILIES["llama"]()).to(torch.bfloat16)  # type: ignore[arg-type]
    prompts = ask(model)
    engine = Engine(model, lambda key: pixels(key).bfloat16(), ENDS, GREEDY)
    assert not engine.exact
    assert set(answers(engine, prompts)) == {prompt.item_id for prompt in prompts}
    assert "bfloat16: answers may differ" in caplog.text


def test_a_stop_ends_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    done = 0
    with pytest.raises(StoppedError, match="continues with the questions not answered"):
        for batch in Engine(model, pixels, ENDS, GREEDY, rows=2).replies(ask(model)):
            done += len(batch)
            monkeypatch.setattr(generation, "stop_requested", lambda: True)
    assert done == 2


def test_damaged_weights_are_an_error_and_no_answer() -> None:
    model = model_of(FAMILIES["llama"]())
    with torch.no_grad():
        model.llm.get_output_embeddings().weight[4] = float("nan")  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match="not finite"):
        answers(Engine(model, pixels, ENDS, GREEDY), ask(model))
    with pytest.raises(FloatingPointError):
        next(decode_alone(model.llm, torch.zeros(1, 3, WIDTH), Chooser(GREEDY, 1, torch.device("cpu")), ENDS, NEW))


def test_a_rotary_embedding_with_a_memory_promises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**{**LLAMA, "max_position_embeddings": 16}, rope_parameters=rope)  # type: ignore[arg-type]
    model = model_of(LlamaForCausalLM(config))
    engine = Engine(model, pixels, ENDS, GREEDY)
    answers(engine, ask(model)[:2])
    assert not engine.exact and "depends on what was asked before" in caplog.text
