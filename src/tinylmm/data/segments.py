"""What a conversation is made of, and how its pieces become token ids and loss labels together.

A chat template lays a conversation out as segments: structure and content in order, each marked as supervised or not. The
text between two special positions (an image slot, a structural token) is tokenised as one string, so that the ids are those
of the whole text; special ids are put in by structure alone, so that no content ("</s>", "<image>", " ASSISTANT: ") can
become structure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from tinylmm.constants import IGNORE_INDEX, IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        user: what the user says; every `<image>` in it is an image slot, unless `around` says otherwise.
        assistant: the answer, in which `<image>` is text like any other; None where it is to be generated.
        around: the question's texts before, between and behind its image slots, where the data format tells slots from the
            text `<image>`; None splits `user` at every `<image>`.
    """

    user: str
    assistant: str | None
    around: tuple[str, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts around the image slots: one more than there are slots."""
        return tuple(self.user.split(IMAGE_SLOT)) if self.around is None else self.around

    @property
    def num_images(self) -> int:
        """Image slots of the question."""
        return len(self.texts) - 1


@dataclass(frozen=True)
class Rendered:
    """Token ids with one IMAGE_TOKEN_ID an image, and as many labels (not shifted; IGNORE_INDEX = no loss)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Segment:
    """A run of text, or one special position (`slot`: an image, `token`: a structural token such as EOS)."""

    text: str
    supervised: bool = False
    special: Literal["slot", "token"] | None = None


IMAGE = Segment(IMAGE_SLOT, special="slot")


def structure(text: str, tokens: Iterable[str], supervised: bool = False) -> list[Segment]:
    """Cut structural text at its tokens: `<|im_start|>user\\n` is a token and a text. Never use it on content."""
    names = sorted((token for token in tokens if token), key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    return [Segment(piece, supervised, "token" if number % 2 else None) for number, piece in enumerate(pieces) if piece]


def encode(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, tokens: frozenset[str], bos: bool
) -> Rendered:
    """Tokenise a conversation.

    Args:
        tokens: structural tokens of the template; their text in content stays text.
        bos: put the tokenizer's BOS in front where the tokenizer itself would and the segments do not begin with it.

    Raises:
        UserError: the tokenizer is a slow one, lacks one of the structural tokens in `segments`, or makes a special id of
            ordinary text.
    """
    encoder = _encoder(tokenizer, tokens)
    ids: list[int] = []
    labels: list[int] = []
    first = segments[0] if segments else None
    leads_with_bos = first is not None and first.special == "token" and encoder.id_of(first.text) == encoder.bos_id
    if bos and encoder.bos_id is not None and not leads_with_bos:
        ids.append(encoder.bos_id)
        labels.append(IGNORE_INDEX)
    piece: list[Segment] = []
    continued = swallow = False  # the piece stands behind a token; that token eats the white space behind it
    for segment in [*segments, None]:
        if segment is not None and segment.special is None:
            piece.append(segment)
            continue
        token_id = None if segment is None or segment.special == "slot" else encoder.id_of(segment.text)
        piece = _stripped(piece, left=swallow, right=token_id is not None and encoder.strips_left(token_id))
        piece_ids, piece_labels = encoder.encode(piece, continued)
        ids += piece_ids
        labels += piece_labels
        piece = []
        if segment is not None:
            ids.append(IMAGE_TOKEN_ID if token_id is None else token_id)
            labels.append(ids[-1] if segment.supervised else IGNORE_INDEX)
            # Behind the BOS that the tokenizer would have put there itself, the text begins as if there were none.
            continued = token_id is not None and not (bos and leads_with_bos and len(ids) == 1)
            swallow = token_id is not None and encoder.strips_right(token_id)
    return Rendered(ids, labels)


def _stripped(segments: list[Segment], left: bool, right: bool) -> list[Segment]:
    """What is left of a piece between tokens that swallow white space, as Phi-3's do."""
    kept = list(segments)
    while left and kept and not kept[0].text.lstrip():
        kept.pop(0)
    if left and kept:
        kept[0] = replace(kept[0], text=kept[0].text.lstrip())
    while right and kept and not kept[-1].text.rstrip():
        kept.pop()
    if right and kept:
        kept[-1] = replace(kept[-1], text=kept[-1].text.rstrip())
    return kept


class _Encoder:
    """Tokenises text with a private copy of a fast tokenizer's backend, to which no text is a special token."""

    def __init__(self, tokenizer: Any, tokens: frozenset[str]) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) is a slow one: it cannot tell "
                "where in the text a token lies, so answers cannot be told from questions. Use a fast tokenizer, which "
                "is one that has a tokenizer.json."
            )
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        special_ids = set(tokenizer.all_special_ids)
        for token in state["added_tokens"]:  # also those that were added as plain tokens
            token["special"] = token["special"] or token["id"] in special_ids or token["content"] in tokens
        _forget_merges(state)
        self._start = _backend(state)
        # Tokenizers with prepend_scheme=first put a space before the text's first word only, not before one behind EOS.
        self._continued = _backend(_without_first_prefix(state))
        probe = tokenizer("a")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id if adds_bos else None
        # An unknown word may be the unknown token, unless that doubles as one that ends an answer.
        self._never = {token["id"] for token in state["added_tokens"] if token["special"]}
        if tokenizer.unk_token not in tokens:
            self._never.discard(tokenizer.unk_token_id)

    def id_of(self, token: str) -> int:
        """The id of a structural token."""
        found = token_id(self._tokenizer, token)
        if found is None:
            raise UserError(f"the tokenizer '{self._tokenizer.name_or_path}' has no token '{token}'.")
        return found

    def strips_left(self, token: int) -> bool:
        """Whether the token swallows white space before it."""
        added = self._tokenizer.added_tokens_decoder.get(token)
        return added is not None and bool(added.lstrip)

    def strips_right(self, token: int) -> bool:
        """Whether the token swallows white space behind it."""
        added = self._tokenizer.added_tokens_decoder.get(token)
        return added is not None and bool(added.rstrip)

    def encode(self, segments: Sequence[Segment], continued: bool) -> tuple[list[int], list[int]]:
        """Tokenise the segments as one string; a token is supervised if it ends inside a supervised segment.

        Args:
            segments: text segments only.
            continued: the piece stands behind a token of the same text, not at its start or behind an image.
        """
        text = "".join(segment.text for segment in segments)
        if not text:
            return [], []
        supervised = bytearray()
        for segment in segments:
            supervised += bytes([segment.supervised]) * len(segment.text)
        encoding = (self._continued if continued else self._start).encode(text, add_special_tokens=False)
        ids = encoding.ids
        if not self._never.isdisjoint(ids):
            found = next(token for token in ids if token in self._never)
            raise UserError(
                f"the tokenizer '{self._tokenizer.name_or_path}' makes the special token "
                f"'{self._tokenizer.convert_ids_to_tokens(found)}' of ordinary text, so a text could end an answer or play "
                "a role. Use a tokenizer that encodes every text by its own vocabulary, or clean the data."
            )
        if not any(supervised):
            return ids, [IGNORE_INDEX] * len(ids)
        supervised.append(supervised[-1])  # for an empty token behind the last character
        labels = [
            token if supervised[end - 1 if end > start else start] else IGNORE_INDEX
            for token, (start, end) in zip(ids, encoding.offsets, strict=True)
        ]
        return ids, labels


def token_id(tokenizer: Any, token: str | None) -> int | None:
    """Return the id of a text that is one token of the tokenizer, or None."""
    found = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token else None


@lru_cache(maxsize=8)
def _encoder(tokenizer: PreTrainedTokenizerBase, tokens: frozenset[str]) -> _Encoder:
    return _Encoder(tokenizer, tokens)


def _backend(state: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True  # the text of a special token is text, wherever it comes from
    return backend


def _forget_merges(state: dict[str, Any]) -> None:
    """Drop merges that spell a special token: vocabularies converted from SentencePiece may have `</` + `s>`."""
    model = state["model"]
    if model.get("type") != "BPE" or not model.get("merges"):
        return
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in special]


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _without_first_prefix(state: Any) -> Any:
    """A copy of a tokenizer's JSON in which `prepend_scheme: first` is `never`."""
    if isinstance(state, dict):
        return {
            key: "never" if key == "prepend_scheme" and value == "first" else _without_first_prefix(value)
            for key, value in state.items()
        }
    return [_without_first_prefix(value) for value in state] if isinstance(state, list) else state
