"""Chat templates: a conversation becomes token ids and their loss labels together, never by splitting rendered text.

A template lays a conversation out as segments: structure and content in order, each marked as supervised or not. The
text between two special ids (image slot, EOS) is tokenised as one string, so that the ids are those of the whole text;
special ids are put in by structure alone, so that no content ("</s>", "<image>", " ASSISTANT: ") can become structure.
Renderings are byte-exact with TinyLLaVA Factory (main) and LLaVA v1; see tests/golden/test_chat_templates.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tinylmm.errors import ConfigError, Fault, UserError, suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_ID = -200
"""Stands for one image in `input_ids`; replaced by image features, never embedded (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORE_INDEX = -100
"""Label of a position without loss (PyTorch's cross-entropy default)."""
IMAGE_SLOT = "<image>"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        user: what the user says; every `<image>` in it is an image slot.
        assistant: the answer, in which `<image>` is text like any other; None where it is to be generated.
    """

    user: str
    assistant: str | None


@dataclass(frozen=True)
class Rendered:
    """Token ids with one IMAGE_TOKEN_ID an image, and as many labels (not shifted; IGNORE_INDEX = no loss)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Segment:
    """A run of text, or one special position (`slot`: an image, `end`: EOS)."""

    text: str
    supervised: bool = False
    special: str | None = None


_IMAGE = _Segment(IMAGE_SLOT, special="slot")


@dataclass(frozen=True)
class ChatTemplate:
    """The Vicuna layout: `{system} USER: {question} ASSISTANT: {answer}{eos}`, turns joined by nothing.

    Attributes:
        name: key in TEMPLATES, stored in checkpoints.
        system: opens every conversation once.
        eos: text of the end-of-sequence token that closes each answer; None for none.
    """

    name: str
    system: str
    eos: str | None

    def text(self, turns: Sequence[Turn]) -> str:
        """Return the exact text, with `<image>` at image slots and the EOS token's text behind answers."""
        return "".join(segment.text for segment in self._segments(turns))

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
        """Return ids and labels of a complete conversation; answers and their EOS are supervised in every turn.

        Raises:
            UserError: the tokenizer is a slow one, or does not know the template's EOS token.
            ValueError: there is no turn, or one without an answer.
        """
        if not turns or any(turn.assistant is None for turn in turns):
            raise ValueError("render() takes complete turns; render_prompt() takes an open one")
        return self._encode(turns, tokenizer)

    def render_prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids after which the model writes the last turn's answer (no trailing space).

        Raises:
            UserError: as `render`.
            ValueError: the last turn has an answer already, or an earlier one has none.
        """
        if not turns or turns[-1].assistant is not None or any(turn.assistant is None for turn in turns[:-1]):
            raise ValueError("render_prompt() takes turns of which exactly the last has no answer")
        return self._encode(turns, tokenizer).input_ids

    def _segments(self, turns: Sequence[Turn]) -> list[_Segment]:
        segments = [_Segment(f"{self.system} ")]
        for turn in turns:
            segments += [_Segment("USER: "), *_user_segments(turn.user), _Segment(" ASSISTANT:")]
            if turn.assistant is not None:
                # The loss begins at the space before the answer: it is part of the answer's first token.
                segments.append(_Segment(f" {turn.assistant}", supervised=True))
                if self.eos is not None:
                    segments.append(_Segment(self.eos, supervised=True, special="end"))
        return segments

    def _encode(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
        encoder = _encoder(tokenizer)
        eos_id = None if self.eos is None else self._eos_id(tokenizer)
        ids = [] if encoder.bos_id is None else [encoder.bos_id]
        labels = [IGNORE_INDEX] * len(ids)
        piece: list[_Segment] = []
        after_eos = False
        for segment in [*self._segments(turns), None]:
            if segment is not None and segment.special is None:
                piece.append(segment)
                continue
            piece_ids, piece_labels = encoder.encode(piece, continued=after_eos)
            ids += piece_ids
            labels += piece_labels
            piece = []
            if segment is not None:
                after_eos = segment.special == "end"
                special_id = eos_id if after_eos else IMAGE_TOKEN_ID
                assert special_id is not None, "an `end` segment exists only where the template has an EOS"
                ids.append(special_id)
                labels.append(special_id if segment.supervised else IGNORE_INDEX)
        return Rendered(ids, labels)

    def _eos_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id of the template's EOS text; every conversation ends with it, so it must be one known token."""
        token_id = tokenizer.convert_tokens_to_ids(self.eos)
        if isinstance(token_id, int) and tokenizer.convert_ids_to_tokens(token_id) == self.eos:
            return token_id
        fitting = [t.name for t in TEMPLATES.values() if t.eos is not None and t.eos == tokenizer.eos_token]
        raise UserError(
            f"template '{self.name}' does not fit the tokenizer '{tokenizer.name_or_path}': it ends answers with "
            f"'{self.eos}', which is no token there (the tokenizer's own EOS is '{tokenizer.eos_token}'). "
            f"Templates that fit: {', '.join(fitting) or 'none'}. Set llm.template or the stage's template."
        )


class CaptionTemplate(ChatTemplate):
    """Pretraining on captions: `<image>{caption}` and a newline. The question's words are thrown away, there is no EOS.

    Unlike the Factory's, it gives a turn exactly the image slots that its question has. The Factory adds one to every
    turn, also of text-only and multi-turn data, which then has more slots than images.
    """

    def _segments(self, turns: Sequence[Turn]) -> list[_Segment]:
        segments: list[_Segment] = []
        for turn in turns:
            segments += [_IMAGE] * turn.user.count(IMAGE_SLOT)
            if turn.assistant is not None:
                segments.append(_Segment(f"{turn.assistant}\n", supervised=True))
        return segments


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("phi", VICUNA_SYSTEM, "<|endoftext|>"),
        ChatTemplate("llama", VICUNA_SYSTEM, "</s>"),
        CaptionTemplate("pretrain", "", None),
        CaptionTemplate("plain", "", None),  # LLaVA's name for the same text
    )
}
"""Every chat template by name. Stages name theirs in `template`, an LLM its own in `llm.template`."""


def get_template(name: str) -> ChatTemplate:
    """Return the template called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    what = f"unknown chat template '{name}'. {suggestion(name, TEMPLATES)}".rstrip()
    raise ConfigError([Fault("template", what, f"Allowed: {', '.join(TEMPLATES)}.")])


def _user_segments(user: str) -> list[_Segment]:
    """A question's one slot goes in front, on a line of its own (the Factory's rule); several slots stay in place."""
    texts = user.split(IMAGE_SLOT)
    if len(texts) == 2:
        return [_IMAGE, _Segment("\n" + "".join(texts).strip())]
    segments = [_Segment(texts[0])]
    for text in texts[1:]:
        segments += [_IMAGE, _Segment(text)]
    return segments


class _Encoder:
    """Tokenises text with a private copy of a fast tokenizer's backend, to which no text is a special token."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) is a slow one: it cannot tell "
                "where in the text a token lies, so answers cannot be told from questions. Use a fast tokenizer, which "
                "is one that has a tokenizer.json."
            )
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        special_ids = set(tokenizer.all_special_ids)
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["id"] in special_ids  # also those added as plain tokens
        self._start = _backend(state)
        # Tokenizers with prepend_scheme=first put a space before the text's first word only, not before one behind EOS.
        self._continued = _backend(_without_first_prefix(state))
        probe = tokenizer("a")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id if adds_bos else None

    def encode(self, segments: Sequence[_Segment], continued: bool) -> tuple[list[int], list[int]]:
        """Tokenise the segments as one string; a token is supervised if it starts inside a supervised segment.

        Args:
            segments: text segments only.
            continued: the piece stands behind EOS in the same text, not at its start or behind an image.
        """
        text = "".join(segment.text for segment in segments)
        if not text:
            return [], []
        supervised = bytearray()
        for segment in segments:
            supervised += bytes([segment.supervised]) * len(segment.text)
        encoding = (self._continued if continued else self._start).encode(text, add_special_tokens=False)
        ids = encoding.ids
        labels = [
            token if supervised[min(start, len(text) - 1)] else IGNORE_INDEX
            for token, (start, _) in zip(ids, encoding.offsets, strict=True)
        ]
        return ids, labels


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    return _Encoder(tokenizer)


def _backend(state: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True  # the text of a special token is text, wherever it comes from
    return backend


def _without_first_prefix(state: Any) -> Any:
    """A copy of a tokenizer's JSON in which `prepend_scheme: first` is `never`."""
    if isinstance(state, dict):
        return {
            key: "never" if key == "prepend_scheme" and value == "first" else _without_first_prefix(value)
            for key, value in state.items()
        }
    return [_without_first_prefix(value) for value in state] if isinstance(state, list) else state
