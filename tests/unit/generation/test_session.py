"""Answers are the same however they are asked for: at once, streamed, in a batch, in a conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tinylmm
from tests.builders import redescribe, tiny_loaded
from tests.reference import generate
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.data.chat import TEMPLATES, Turn
from tinylmm.errors import DataError, UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.prompts import Prompt
from tinylmm.generation.session import ChatModel, Exchange, _Loaded
from tinylmm.models.anyres import with_tiles
from tinylmm.models.checkpoint import save_model

N = 24
RED, BLUE = Image.new("RGB", (20, 30), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """Random weights, wide enough apart that every token of the context matters to the answer."""
    loaded = tiny_loaded()
    for module in (loaded.model.llm, loaded.model.connector, loaded.model.vision_tower):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(loaded, folder, None, {})
    return tinylmm.load(folder, device="cpu")


def by_generate(model: ChatModel, turns: list[Turn], images: list[Image.Image]) -> str:
    """The answer by transformers' own generation, from ids put together by hand."""
    ids = TEMPLATES["llama"].render_prompt(turns, model.tokenizer)
    row = [t for i in ids for t in ([i] * model.model.image_tokens if i == IMAGE_TOKEN_ID else [i])]
    features = None
    if images:
        with torch.no_grad():
            features = model.model.vision_tower(
                torch.stack([model.transform(image.convert("RGB")) for image in images])
            )
    [new] = generate(model.model, [row], features, N, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id)
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_chat_stream_and_batch_give_the_greedy_text_of_generate(model: ChatModel, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    past = [Exchange("What is it?", "a red 3", (RED,)), ("Sure?", "yes")]
    two = "Is <image> or <image> red?"
    before = [Turn("<image>\nWhat is it?", "a red 3"), Turn("Sure?", "yes")]
    cases: list[tuple[str, object, list[object], list[Turn], list[Image.Image]]] = [
        ("Who are you?", None, [], [Turn("Who are you?", None)], []),
        ("What is it?", tmp_path / "red.png", [], [Turn("<image>\nWhat is it?", None)], [RED]),
        (two, [BLUE, str(tmp_path / "red.png")], [], [Turn(two, None)], [BLUE, RED]),
        ("And now?", BLUE, past, [*before, Turn("<image>\nAnd now?", None)], [RED, BLUE]),
    ]
    expected = [by_generate(model, turns, images) for *_, turns, images in cases]
    assert len(set(expected)) == len(cases) and all(expected)
    for (prompt, image, history, *_), text in zip(cases, expected, strict=True):
        assert model.chat(prompt, image, history, max_new_tokens=N) == text
        pieces = list(model.stream(prompt, image, history, max_new_tokens=N))
        assert "".join(pieces) == text and len(pieces) > 3
    prompts, images, histories = ([case[i] for case in cases] for i in range(3))
    for size in (1, 3, 8):
        assert model.chat_batch(prompts, images, histories, batch_size=size, max_new_tokens=N) == expected
    assert model.chat(prompts, images, histories, max_new_tokens=N) == expected
    assert model.chat(["Who are you?"] * 2, max_new_tokens=N) == expected[:1] * 2


def test_a_conversation_remembers_and_an_abandoned_answer_does_not_count(model: ChatModel) -> None:
    talk = model.conversation(RED)
    next(talk.stream("What is it?", max_new_tokens=N))
    assert talk.history == []
    first = talk.ask("What is it?", max_new_tokens=N)
    second = talk.ask("Sure?", max_new_tokens=N)
    assert first == by_generate(model, [Turn("<image>\nWhat is it?", None)], [RED])
    assert second == by_generate(model, [Turn("<image>\nWhat is it?", first), Turn("Sure?", None)], [RED])
    assert [exchange.answer for exchange in talk.history] == [first, second]
    talk.show(BLUE)
    talk.ask("And this?", max_new_tokens=1)
    assert [len(exchange.images) for exchange in talk.history] == [1, 0, 1]


def test_an_answer_stops_at_any_of_the_end_tokens_and_its_neighbour_goes_on(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Who?", "Who are you, and what is it?"]
    whole = [tokens_of(model, prompt) for prompt in prompts]
    end = next(token for token in whole[0][2:] if token not in whole[0][:2] and token not in whole[1])
    monkeypatch.setattr(model.prompts, "ends", model.prompts.ends | {end})
    short, other = model.chat_batch(prompts, max_new_tokens=N)
    assert (
        short == model.prompts.text(whole[0][: whole[0].index(end)]).strip() == model.chat(prompts[0], max_new_tokens=N)
    )
    assert other == model.prompts.text(whole[1]).strip()


def tokens_of(model: ChatModel, prompt: str) -> list[int]:
    return list(model._engine(_Loaded(), Sampling(max_new_tokens=N)).stream(asked(model, prompt)))


def asked(model: ChatModel, prompt: str) -> Prompt:
    return model._prepare("", prompt, None, (), _Loaded())


def test_draws_follow_the_seed_alone_and_narrow_to_greedy(model: ChatModel) -> None:
    options = {"temperature": 1.5, "top_p": 0.95, "top_k": 200, "max_new_tokens": N}
    first = model.chat("Who are you?", seed=1, **options)
    torch.manual_seed(123)
    assert model.chat("Who are you?", seed=1, **options) == first
    assert "".join(model.stream("Who are you?", seed=1, **options)) == first
    assert model.chat_batch(["And you?", "Who are you?"], seed=1, **options)[1] == first
    assert model.chat("Who are you?", seed=2, **options) != first
    asked_often = ["Who are you?", "And you, who are you?", "Who?", "What is it?"]
    single = [model.chat(prompt, seed=3, repetition_penalty=1.3, **options) for prompt in asked_often]
    for size in (1, 2, 8):
        drawn = model.chat_batch(asked_often, seed=3, repetition_penalty=1.3, batch_size=size, **options)
        assert drawn == single
    greedy = model.chat("Who are you?", max_new_tokens=N)
    assert model.chat("Who are you?", temperature=3.0, top_k=1, max_new_tokens=N) == greedy
    assert model.chat("Who are you?", repetition_penalty=50.0, max_new_tokens=N) != greedy


def test_wrong_input_is_told_in_a_sentence(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 `<image>` slots, but 0 images"):
        model.chat("What is <image>?")
    with pytest.raises(DataError, match=r"cat\.png: no such image file.*nothing is downloaded"):
        model.chat("What?", image="http://example.org/cat.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="not a readable"):
        model.chat("What?", image=tmp_path / "text.png")
    with pytest.raises(UserError, match=r"tokens long with its images, and the model reads 256 at most"):
        model.stream("what is it " * 200)
    with pytest.raises(UserError, match="2 prompts need as many entries"):
        model.chat_batch(["a", "b"], images=[RED])
    with pytest.raises(UserError, match=r"batch_size is 0; it must be a whole number of 1 or more"):
        model.chat_batch(["a"], batch_size=0)
    with pytest.raises(UserError, match=r"temperature is -1; it must be 0"):
        model.chat("a", temperature=-1)
    with pytest.raises(UserError, match=r"top_p is 0"):
        Sampling(top_p=0)
    with pytest.raises(UserError, match="dtype is 'int8'"):
        tinylmm.load(tmp_path, dtype="int8")


def test_an_unknown_option_is_named_with_those_that_there_are(model: ChatModel) -> None:
    for ask in (lambda **more: model.chat("hi", **more), lambda **more: model.stream("hi", **more)):
        with pytest.raises(
            UserError, match=r"no option 'max_tokens'\. Did you mean 'max_new_tokens'\? Options: max_new"
        ):
            ask(max_tokens=3)
        with pytest.raises(UserError, match=r"no option 'num_beams'\. Options: max_new_tokens, temperature"):
            ask(num_beams=3)


def test_messages_are_answered_as_the_exchanges_that_they_hold(model: ChatModel) -> None:
    past = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a red 3"}]
    expected = model.chat("Sure?", history=[("What is it?", "a red 3")], max_new_tokens=N)
    assert model.chat("Sure?", history=past, max_new_tokens=N) == expected
    told = [{"role": "system", "content": "Say no."}, *past]
    ids = model._prepare("", "Sure?", None, told, _Loaded()).ids
    turns = [Turn("What is it?", "a red 3"), Turn("Sure?", None)]
    assert list(ids) == TEMPLATES["llama"].render_prompt(turns, model.tokenizer, "Say no.")


def test_the_store_may_be_named_as_text_and_the_device_as_torch_does(tmp_path: Path) -> None:
    save_model(tiny_loaded(), tmp_path / "model", None, {})
    tinylmm.load(tmp_path / "model", store=str(tmp_path), device=torch.device("cpu"))
    with pytest.raises(UserError, match="neither a folder nor the name of a run in"):
        tinylmm.load("nothing", store=str(tmp_path))
    with pytest.raises(UserError, match="device is 'mps', but torch"):
        tinylmm.load(tmp_path / "model", device="mps")


def test_a_conversations_image_is_opened_when_it_begins(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such image file"):
        model.conversation(tmp_path / "missing.png")


def test_an_answer_ends_where_the_context_ends(model: ChatModel) -> None:
    prompt = ("it " * 60).strip()
    used = len(TEMPLATES["llama"].render_prompt([Turn(prompt, None)], model.tokenizer))
    whole = asked(model, prompt)
    assert len(whole.ids) == used and whole.limit == 256 - used
    tokens = list(model._engine(_Loaded(), Sampling(max_new_tokens=1000)).stream(whole))
    assert 0 < len(tokens) <= 256 - used
    short = model.chat("Who?", max_new_tokens=200)
    assert model.chat_batch([prompt, "Who?"], max_new_tokens=200) == [model.chat(prompt, max_new_tokens=200), short]


def test_tiled_images_take_tokens_after_their_size_in_every_way_of_asking(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    redescribe(loaded, image=loaded.description.as_json()["image"] | {"mode": "anyres", "tiles": [[1, 2], [2, 1]]})
    image = loaded.description.image
    loaded.model.connector = with_tiles(loaded.model.connector, image, loaded.model.vision_tower.num_tokens)
    save_model(loaded, tmp_path / "model", None, {})
    model = tinylmm.load(tmp_path / "model", device="cpu")
    wide = Image.new("RGB", (40, 12), (0, 255, 0))
    assert model.model.tokens_of(*wide.size) != model.model.tokens_of(*RED.size)
    images = _Loaded()
    prepared = model._prepare("", "What is it?", [wide, RED], (), images)
    features = torch.cat([model.model.tower_features(images.pixels[key]) for key in prepared.images])
    ends, pad = int(model.tokenizer.eos_token_id), int(model.tokenizer.pad_token_id)
    sizes = torch.tensor([images.sizes[key] for key in prepared.images])
    [new] = generate(model.model, [list(prepared.ids)], features, N, ends, pad, sizes)
    assert model.chat("What is it?", [wide, RED], max_new_tokens=N) == model.prompts.text(new).strip()
    both = model.chat_batch(["What is it?", "Who?"], [[wide, RED], None], max_new_tokens=N)
    assert both == [model.prompts.text(new).strip(), model.chat("Who?", max_new_tokens=N)]


def test_an_image_is_encoded_once_in_a_conversation_and_the_oldest_are_let_go(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model._features.encoded
    talk = model.conversation(Image.new("RGB", (16, 16), (0, 77, 0)))
    for asked_now in ("What is it?", "Sure?", "Really?"):
        talk.ask(asked_now, max_new_tokens=1)
    assert model._features.encoded == before + 1
    monkeypatch.setattr(model._features, "keep", 2)
    for shade in range(5):
        model.chat("What is it?", Image.new("RGB", (16, 16), (0, 0, shade)), max_new_tokens=1)
    assert len(model._features._features) == 2


def test_an_image_of_too_many_pixels_is_refused_however_it_comes(
    model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylmm.data.images.MAX_PIXELS", 100)
    RED.save(tmp_path / "red.png")
    for image in (RED, tmp_path / "red.png"):
        with pytest.raises(DataError, match=r"image is too large \(20 x 30 = 600 pixels\); at most 100 pixels"):
            model.chat("What is it?", image)
