"""Training a small byte-level BPE tokenizer with Llama's special tokens and habits."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinylmm.errors import ConfigError, Fault

BOS, EOS, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "<pad>"
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; any text can be encoded, and decoding gives it back.

    As in Llama's tokenizer, encoding puts `<s>` in front, and no token holds two digits, so that reading a number is
    reading its digits. A space goes with the word or digit behind it.

    Args:
        texts: plain text, without special tokens.
        vocab_size: entries at most, special tokens and the 256 bytes included; short texts may give fewer.
        max_length: tokens that the model takes (`model_max_length`).

    Raises:
        ConfigError: `vocab_size` has no room for the bytes and the special tokens.
    """
    special = [BOS, EOS, UNKNOWN, PAD]
    smallest = NUM_BYTES + len(special)
    if vocab_size < smallest:
        what = f"is {vocab_size}; a byte-level BPE has {NUM_BYTES} bytes and {len(special)} special tokens at least."
        raise ConfigError([Fault("llm.tokenizer.vocab_size", what, f"Set {smallest} or more.")])
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
