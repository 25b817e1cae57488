"""A tokenizer as llama.cpp has it: tokens, merges or scores, special ids, and which of its pre-tokenisers splits alike.

llama.cpp has two kinds that matter here. "gpt2" is byte-level BPE with merges and a named pre-tokeniser; "llama" is
SentencePiece's BPE, where of two neighbours those are joined first that make the piece of the highest score.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinylmm.convert.chat_template import llama_cpp_template
from tinylmm.convert.gguf_files import GGUFFile
from tinylmm.data.chat import get_template

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
_WORD = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2", f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe"}
"""Pattern that a tokenizer splits at before byte-level BPE -> llama.cpp's name of the same (StableLM-2's is Qwen2's)."""
_OWN_SPLIT = r" ?\d"
"""Of tokenizers that tinylmm trains (models/tokenizer.py)."""
_SPACE, _LINE, _TAB = "Ġ", "Ċ", "ĉ"
"""What byte-level BPE writes for them."""
_IGNORES_MERGES = "llama-bpe"


@dataclass(frozen=True)
class Vocabulary:
    """How llama.cpp is to tokenise.

    Attributes:
        model: "gpt2" or "llama".
        pre: its pre-tokeniser; of "llama" there is one alone.
        prefix: whether a text begins with a space that it does not have.
        notes: where its ids may be others than the tokenizer's, one sentence each.
    """

    model: str
    pre: str = "default"
    prefix: bool = False
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary | str:
    """How llama.cpp is to tokenise as this tokenizer does, or why it cannot."""
    state = _state(tokenizer)
    model = state["model"]
    if model["type"] != "BPE":
        return f"its tokenizer is a BPE in llama.cpp, and this one is of type {model['type']}"
    if model.get("byte_fallback"):
        return _sentencepiece(state)
    if {step["type"] for step in _steps(state["normalizer"], "normalizers")} - {"NFC"}:
        return "llama.cpp leaves text as it is before byte-level BPE, and this tokenizer changes it first"
    pre = _pre_tokenizer(state)
    if pre is None:
        shown = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
        return f"llama.cpp has no pre-tokeniser that splits text as this tokenizer does ({shown})"
    if bool(model.get("ignore_merges")) != (pre == _IGNORES_MERGES):
        looks = "does not look" if model.get("ignore_merges") else "looks"
        return f"llama.cpp's pre-tokeniser '{pre}' {looks} whole words up before it merges, and this tokenizer differs"
    return Vocabulary("gpt2", pre)


def write_vocabulary(tokenizer: Any, vocabulary: Vocabulary, template: str, rows: int, file: GGUFFile) -> bool:
    """Write tokens, merges or scores, special ids and chat template; return whether there is a chat template.

    Args:
        template: name of the chat template.
        rows: of the embedding table; ids that the tokenizer lacks become unused tokens.
    """
    writer, state = file.writer, _state(tokenizer)
    tokens, types = _tokens(tokenizer, state, rows, vocabulary.model)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    pairs = _merges(state["model"])
    if vocabulary.model == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    else:
        writer.add_token_scores(_scores(tokens, types, pairs))
    writer.add_add_space_prefix(vocabulary.prefix)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    for name, token in _special_ids(tokenizer, template).items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(int(token))
    source = llama_cpp_template(get_template(template).fitted(tokenizer))
    if source is not None:
        writer.add_chat_template(source)
    return source is not None


def _special_ids(tokenizer: Any, template: str) -> dict[str, int | None]:
    """llama.cpp's names of special tokens -> ids; what ends an answer besides EOS is its end of a turn."""
    ends = get_template(template).stop_ids(tokenizer)
    eos = ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": next((end for end in ends if end != eos), None),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }


def _scores(tokens: list[str], types: list[int], pairs: list[tuple[str, str]]) -> list[float]:
    """Minus the rank of the first merge that makes a piece; what no merge makes comes last."""
    ranks = {piece: first for piece, (first, _) in _ranks(pairs).items()}
    last = len(pairs)
    return [
        -float(ranks.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int, model: str) -> tuple[list[str], list[int]]:
    """Text and type of every id below `rows`."""
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token["special"])}
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            kind, token = UNUSED, f"[PAD{number}]"
        elif model == "llama" and number == tokenizer.unk_token_id:
            kind = UNKNOWN
        elif number in special:
            kind = CONTROL
        elif number in added:
            kind, token = USER_DEFINED, token.replace(_WORD, " ") if model == "llama" else token
        else:
            kind = BYTE if model == "llama" and token.startswith("<0x") and len(token) == len("<0x00>") else NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _state(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, of which one alone is no sequence."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer(state: dict[str, Any]) -> str | None:
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    words = bool(steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and words and steps[0]["individual_digits"]:
        return "smollm"
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[0].get("invert"):
        return None
    pattern = steps[0]["pattern"].get("Regex")
    if pattern == _OWN_SPLIT and words:
        return "gpt-2" if _digits_stand_alone(state["model"]) else None
    return None if words else _SPLITS.get(pattern)


def _digits_stand_alone(model: dict[str, Any]) -> bool:
    """Whether merges make the same of text that is split at ` ?\\d` first and of text that is not.

    They do if none reaches across a digit's edge, and none joins line breaks or tabs, of which the last one before a digit
    is split from the others in the one case alone. Text in other scripts than ASCII has to be single bytes.
    """
    made = {left + right for left, right in _merges(model)}
    plain = {piece.replace(_SPACE, " ").replace(_LINE, "\n").replace(_TAB, "\t") for piece in made}
    lines = {piece for piece in plain if not piece.strip() and piece.strip(" ")}
    joined = {piece for piece in plain if re.search(r"\d", piece) and not re.fullmatch(r" ?\d", piece)}
    return all(piece.isascii() for piece in plain) and not lines and not joined


def _sentencepiece(state: dict[str, Any]) -> Vocabulary | str:
    """SentencePiece's BPE as tokenizers has it: spaces become `▁`, perhaps with one more in front of a text."""
    normal, pre = _steps(state["normalizer"], "normalizers"), _steps(state["pre_tokenizer"], "pretokenizers")
    replaced = any(step["type"] == "Replace" and step["content"] == _WORD for step in normal)
    spaces = [step for step in pre if step["type"] == "Metaspace"]
    if not (replaced or spaces) or {step["type"] for step in normal} - {"Replace", "Prepend"}:
        return (
            "its SentencePiece tokenizer only turns spaces into '▁' in llama.cpp, and this one prepares text otherwise"
        )
    schemes = [step.get("prepend_scheme", "always") for step in spaces]
    prefix = any(step["type"] == "Prepend" for step in normal) or any(scheme != "never" for scheme in schemes)
    notes = []
    if not _scores_tell(state["model"]):
        notes.append(
            "no scores give the order of all of this tokenizer's merges: llama.cpp may split rare words into other tokens"
        )
    if "first" in schemes:
        notes.append(
            "llama.cpp puts a space behind each special token, this tokenizer in front of a text alone: in a conversation "
            "later questions begin with another token than in training"
        )
    return Vocabulary("llama", prefix=prefix, notes=tuple(notes))


def _ranks(pairs: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Piece that merges make -> the first and the last of their ranks."""
    ranks: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(pairs):
        first, _ = ranks.get(left + right, (rank, rank))
        ranks[left + right] = (first, rank)
    return ranks


def _scores_tell(model: dict[str, Any]) -> bool:
    """Whether a score a piece merges as the list does: each piece in every way it can be cut, one piece after the other."""
    pairs, vocabulary = _merges(model), model["vocab"]
    known, ranks = set(pairs), _ranks(pairs)
    spans = sorted(ranks.values())
    if any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans)):
        return False
    cuts = ((piece[:at], piece[at:]) for piece in ranks for at in range(1, len(piece)))
    return all(cut in known for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary)
