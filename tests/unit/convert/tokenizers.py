"""Small trained tokenizers that split text as those of the supported LLMs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinylmm.models.tokenizer import train_tokenizer

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
ENGLISH = "A chat between a curious user and an assistant. USER: what is it? ASSISTANT: a red 3, 12 and 2024."
WORDS = [
    ENGLISH,
    "it's what we'll say they're, WE'LL SAY IT'S   so;\n\n  and\tthen\n a 3\n1234 5678\n\n\nünïcödé öde 日本語 日本",
] * 3
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of Qwen's and StableLM-2's tokenizer.json."""
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def byte_level(*steps: Any, words: bool = True, **model: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind the given splits."""
    tokenizer = Tokenizer(models.BPE(**model))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    return _fast(tokenizer)


def sentencepiece(prefix: bool, every_cut: bool = True, first: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as tokenizer.json has it: bytes as fallback, and a merge for every way to cut a piece.

    Args:
        prefix: a space stands in front of each text; with `first`, not behind a special token.
    """
    drawn = Tokenizer(models.BPE())
    drawn.normalizer = normalizers.Replace(" ", "▁")
    drawn.train_from_iterator([words.replace("語", "") for words in WORDS], trainers.BpeTrainer(vocab_size=150))
    letters = [piece for piece in drawn.get_vocab() if len(piece) == 1]
    order = sorted((piece for piece in drawn.get_vocab() if len(piece) > 1), key=drawn.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *order, *sorted(letters), "<pad>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    cuts = [[(piece[:at], piece[at:]) for at in range(1, len(piece))] for piece in order]
    merges = [cut for piece in cuts for cut in piece[: None if every_cut else 1] if cut[0] in vocab and cut[1] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "phi-2": byte_level,
    "qwen2": lambda: byte_level(isolated(QWEN2), words=False),
    "llama-3": lambda: byte_level(isolated(LLAMA3), words=False, ignore_merges=True),
    "smollm2": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "nano": lambda: train_tokenizer([ENGLISH] * 3, 330, 256),
    "llama-2": lambda: sentencepiece(prefix=True),
    "llama-2-new": lambda: sentencepiece(prefix=True, first=True),
    "gemma": lambda: sentencepiece(prefix=False),
}
"""LLM (or our own nano) -> a tokenizer that works as its does."""
