"""What ends an answer is one rule: evaluation, chat, streams and exports stop at the turn's end of the fitted template."""

from __future__ import annotations

import pytest
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.builders import IMAGE, VOCAB, redescribe, tiny_loaded, tiny_tokenizer
from tests.unit.data.test_chat_formats import CHATML, GEMMA
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.convert.hf_folder import generation_of
from tinylmm.data.chat import get_template
from tinylmm.data.slots import question
from tinylmm.data.transform import ImageTransform
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import PromptMaker
from tinylmm.generation.session import ChatModel

NEW = 12
PICTURE = Image.new("RGB", (16, 16), (200, 30, 0))
ASKED = ("What is it?", "Who are you?", "a red 3 in the image, or a user?")
TURNS = {"chatml": (CHATML, "<|im_start|>", "<|im_end|>"), "gemma": (GEMMA, "<start_of_turn>", "<end_of_turn>")}


def with_turn_ends(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer as base models with a chat format have it: its EOS is not what ends a turn."""
    jinja, *tokens = TURNS[kind]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = jinja
    return tokenizer


def model_that_ends_turns(kind: str) -> ChatModel:
    """A random model that says its turn's end as the third token of its first answer, and never the EOS."""
    loaded = tiny_loaded()
    loaded.tokenizer = with_turn_ends(kind)
    loaded.model.template = "native"
    redescribe(loaded, template="native")
    for module in (loaded.model.llm, loaded.model.connector, loaded.model.vision_tower):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    end = loaded.tokenizer.convert_tokens_to_ids(TURNS[kind][2])
    assert end < VOCAB and end != loaded.tokenizer.eos_token_id
    whole = ChatModel(loaded)
    head = loaded.model.llm.get_output_embeddings().weight.data  # type: ignore[operator]
    head[[end, loaded.tokenizer.eos_token_id]] = 0.0
    prompt = whole.prompts.prompt("", [question(ASKED[0], 1)], ["it"], [loaded.model.image_tokens])
    engine = Engine(loaded.model, lambda key: whole.transform(PICTURE), frozenset(), Sampling(max_new_tokens=NEW))
    ids = list(engine.stream(prompt))
    spoken = next(token for place, token in enumerate(ids) if place >= 2 and token not in ids[:place])
    head[[end, spoken]] = head[[spoken, end]]
    return ChatModel(loaded)


@pytest.mark.parametrize("kind", TURNS)
def test_an_answer_ends_with_its_turn_and_is_the_same_in_evaluation_chat_and_stream(kind: str) -> None:
    model = model_that_ends_turns(kind)
    maker = PromptMaker(get_template("native"), model.tokenizer)
    transform = ImageTransform(**IMAGE)
    prompts = [
        maker.prompt(text, [question(text, 1)], ["it"], [model.model.image_tokens]) for text in ASKED
    ]  # as the eval stage makes them
    engine = Engine(model.model, lambda key: transform(PICTURE), maker.ends, Sampling(max_new_tokens=NEW))
    replies = {reply.item_id: reply for batch in engine.replies(prompts) for reply in batch}
    first = replies[ASKED[0]]
    assert 2 <= len(first.ids) < NEW and first.new_tokens == len(first.ids) + 1
    for text in ASKED:
        said = maker.text(replies[text].ids).strip()
        assert model.chat(text, PICTURE, max_new_tokens=NEW) == said
        assert "".join(model.stream(text, PICTURE, max_new_tokens=NEW)) == said
    assert model.chat_batch(ASKED, [PICTURE] * 3, max_new_tokens=NEW) == [
        maker.text(replies[text].ids).strip() for text in ASKED
    ]


@pytest.mark.parametrize("kind", TURNS)
def test_an_export_ends_answers_where_chat_and_evaluation_do(kind: str) -> None:
    tokenizer = with_turn_ends(kind)
    ends = generation_of(tokenizer, "native", 5).eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids(TURNS[kind][2]), tokenizer.eos_token_id]
    assert set(ends) == PromptMaker(get_template("native"), tokenizer).ends


def test_a_prompt_has_as_many_placeholders_as_each_image_takes() -> None:
    maker = PromptMaker(get_template("llama"), tiny_tokenizer())
    prompt = maker.prompt("x", [question("Which?", 2)], ["a", "b"], [3, 2])
    assert prompt.ids.count(IMAGE_TOKEN_ID) == 5 and prompt.images == ("a", "b")
    with pytest.raises(ValueError, match="more image slots than images"):
        maker.prompt("x", [question("Which?", 2)], ["a"], [3])


def test_text_is_what_the_ids_say_without_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    maker = PromptMaker(get_template("llama"), tokenizer)
    assert maker.text([*tokenizer("a red 3 ?")["input_ids"], tokenizer.eos_token_id]) == "a red 3 ?"
