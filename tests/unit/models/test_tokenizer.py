"""The trained tokenizer has Llama's habits and loses no text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tinylmm.data.chat import Turn, get_template
from tinylmm.errors import ConfigError
from tinylmm.models.tokenizer import train_tokenizer

TEXTS = [
    "there is a red 3 top left.\nwhat digit is red?",
    "what colour is the 7? blue",
    "read the digits in order. 3 7",
] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=320, max_length=77).save_pretrained(path)
    return path


def test_it_is_loaded_by_transformers_with_llama_s_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
    )
    assert tokenizer.model_max_length == 77
    assert tokenizer.is_fast
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("red", add_special_tokens=False)["input_ids"][0] != tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["what digit is red?", "  two  spaces\n", "nie gesehen: żółw 数字 🙂", "2037"])
def test_decoding_gives_any_text_back(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_no_token_holds_two_digits(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" 3777", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == [" 3", "7", "7", "7"]


def test_it_fits_the_llama_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = get_template("llama").render([Turn("<image>\nwhat digit is red?", "3")], tokenizer)
    assert [tokenizer.decode([label]) for label in rendered.labels if label >= 0] == [" 3", "</s>"]


def test_training_again_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=320, max_length=77).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llm\.tokenizer\.vocab_size: is 200.*Set 260 or more"):
        train_tokenizer(TEXTS, vocab_size=200, max_length=77)
