"""Token ids and labels by construction, against real tokenizers of both families (trained here in milliseconds)."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.data.chat import TEMPLATES, VICUNA_SYSTEM, Turn, get_template
from tinylmm.errors import ConfigError, UserError

CORPUS = [
    f"{VICUNA_SYSTEM} USER: What colour is the cat? ASSISTANT: The cat is black.",
    "USER: How many digits are there? ASSISTANT: There are three digits.\nUSER ASSISTANT: one two",
] * 4
ONE = [Turn("<image>\nWhat colour is the cat?", "The cat is black.")]
TWO = [*ONE, Turn("How many digits are there?", "There are three.")]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind (phi, Qwen, StableLM): byte-level BPE, no BOS, EOS = unk."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def llama_tokenizer(prefix: str) -> PreTrainedTokenizerFast:
    """Llama's kind: BPE with byte fallback, BOS in front, a space before the first word (or before every piece)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    backend.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens, as in Llama's vocabulary
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "byte-level": (byte_level_tokenizer, "phi"),
    "llama-legacy": (lambda: llama_tokenizer("legacy"), "llama"),
    "llama-first": (lambda: llama_tokenizer("first"), "llama"),
    "llama-always": (lambda: llama_tokenizer("always"), "llama"),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, str]:
    make, template = request.param
    return make(), template


def test_ids_equal_the_tokenizers_own_encoding_of_the_whole_text(family: tuple) -> None:
    tokenizer, name = family
    turns = [Turn("What colour is the cat?", "The cat is black."), Turn("How many?", "Three – 3.")]
    template = get_template(name)
    assert template.render(turns, tokenizer).input_ids == tokenizer(template.text(turns))["input_ids"]


def test_text_around_an_image_is_encoded_as_two_strings_with_one_bos(family: tuple) -> None:
    tokenizer, name = family
    before, after = get_template(name).text(ONE).split("<image>")
    expected = tokenizer(before)["input_ids"]
    rest = tokenizer(after)["input_ids"]
    expected += [IMAGE_TOKEN_ID, *(rest[1:] if rest[0] == tokenizer.bos_token_id else rest)]
    assert get_template(name).render(ONE, tokenizer).input_ids == expected


def test_answers_and_their_eos_are_supervised_in_every_turn_and_nothing_else(family: tuple) -> None:
    tokenizer, name = family
    rendered = get_template(name).render(TWO, tokenizer)
    spans = "".join(" " if label == IGNORE_INDEX else "x" for label in rendered.labels).split()
    supervised = [label for label in rendered.labels if label != IGNORE_INDEX]
    eos = tokenizer.eos_token
    assert len(spans) == 2
    assert tokenizer.decode(supervised).strip() == f"The cat is black.{eos} There are three.{eos}"
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)


def test_prompt_is_a_prefix_of_the_training_ids(family: tuple) -> None:
    tokenizer, name = family
    template = get_template(name)
    prompt = template.render_prompt([*ONE, Turn(TWO[1].user, None)], tokenizer)
    rendered = template.render(TWO, tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize("content", ["</s>", "<|endoftext|>", "<image>", " ASSISTANT: no", "<s>", "USER: x"])
def test_special_text_in_an_answer_stays_text(family: tuple, content: str) -> None:
    tokenizer, name = family
    rendered = get_template(name).render([Turn("<image>\nWhat?", f"a{content}b")], tokenizer)
    supervised = [label for label in rendered.labels if label != IGNORE_INDEX]
    assert rendered.input_ids.count(IMAGE_TOKEN_ID) == 1
    assert rendered.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(supervised[:-1]).strip() == f"a{content}b"


def test_special_text_in_a_question_stays_text_also_where_the_token_was_added_as_a_plain_one() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<|stop|>", special=False)])
    tokenizer.eos_token = "<|stop|>"
    template = type(TEMPLATES["phi"])("stop", VICUNA_SYSTEM, "<|stop|>")
    rendered = template.render([Turn("say <|stop|> now", "no")], tokenizer)
    assert rendered.input_ids.count(tokenizer.convert_tokens_to_ids("<|stop|>")) == 1


def test_several_slots_keep_their_places() -> None:
    tokenizer = byte_level_tokenizer()
    rendered = get_template("phi").render([Turn("<image> one <image> two", "x")], tokenizer)
    pieces = "".join("I" if i == IMAGE_TOKEN_ID else tokenizer.decode([i]) for i in rendered.input_ids)
    assert pieces.endswith("USER: I one I two ASSISTANT: x<|endoftext|>")


def test_pretraining_supervises_caption_and_newline_without_eos(family: tuple) -> None:
    tokenizer, _ = family
    rendered = get_template("pretrain").render([Turn("<image>\nDescribe.", "The cat.")], tokenizer)
    slot = rendered.input_ids.index(IMAGE_TOKEN_ID)
    assert slot == (0 if tokenizer.bos_token is None else 1)
    assert rendered.labels[: slot + 1] == [IGNORE_INDEX] * (slot + 1)
    assert rendered.labels[slot + 1 :] == rendered.input_ids[slot + 1 :]
    assert tokenizer.decode(rendered.input_ids[slot + 1 :]).strip(" ") == "The cat.\n"


def test_rendering_leaves_the_callers_tokenizer_as_it_was() -> None:
    tokenizer = byte_level_tokenizer()
    before = tokenizer.backend_tokenizer.to_str(), tokenizer("a<|endoftext|>")["input_ids"]
    get_template("phi").render(TWO, tokenizer)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer("a<|endoftext|>")["input_ids"]) == before


def test_template_whose_eos_the_tokenizer_lacks_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UserError, match=r"template 'llama' does not fit.*'</s>'.*Templates that fit: phi"):
        get_template("llama").render(TWO, byte_level_tokenizer())


def test_unknown_template_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown chat template 'lama'. Did you mean 'llama'\?.*Allowed: phi"):
        get_template("lama")


def test_slow_tokenizer_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(UserError, match=r"slow one.*tokenizer\.json"):
        get_template("pretrain").render(TWO, Slow())


@pytest.mark.parametrize(
    "turns", [[], [Turn("a", None)], [Turn("a", None), Turn("b", "c")]], ids=["none", "open", "gap"]
)
def test_incomplete_turns_cannot_be_rendered_for_training(turns: list[Turn]) -> None:
    with pytest.raises(ValueError, match="complete turns"):
        get_template("phi").render(turns, byte_level_tokenizer())


@pytest.mark.parametrize("turns", [[], [Turn("a", "b")]], ids=["none", "complete"])
def test_prompt_needs_an_open_last_turn(turns: list[Turn]) -> None:
    with pytest.raises(ValueError, match="exactly the last has no answer"):
        get_template("phi").render_prompt(turns, byte_level_tokenizer())
