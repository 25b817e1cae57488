"""`native`: a model's own chat format, by the chat template in its tokenizer.

The Jinja template is rendered once a shape of conversation (number of turns, with or without a system message), with
placeholders where contents will stand. Contents therefore never pass through the template or the tokenizer's search for
special tokens, and ids and labels come out together as for every other template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tinylmm.data.segments import Segment, Turn, structure
from tinylmm.data.slots import user_segments
from tinylmm.data.templates import ChatTemplate, Choices, fitting_templates
from tinylmm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE, _SPACE = "\ue0f0", "\ue0f1", "\u2003"
"""A placeholder is a number between two private-use characters; the white space around it shows whether contents are
stripped."""
_VARIABLES = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What published templates ask for besides messages: Qwen3 would leave room for a chain of thought that the data does not
have, and Llama-3.1 would write the day of rendering (this is the date of its own default)."""
_PLACEHOLDER = re.compile(f"({_SPACE}?){_OPEN}([0-9]+){_CLOSE}({_SPACE}?)")


@dataclass(frozen=True)
class NativeTemplate(ChatTemplate):
    """Whatever the tokenizer's own chat template says; `fitted` reads it."""

    def fitted(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Return the template of this tokenizer.

        Raises:
            UserError: the tokenizer has no chat template, or one that cannot be trained with.
        """
        return _fitted(tokenizer, self.name, self.choices)

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        raise ValueError("template 'native' is the tokenizer's own: use fitted(tokenizer)")


@dataclass(frozen=True)
class _Slot:
    """Where content `index` stands; `left` and `right` say whether white space around it is kept."""

    index: int
    left: bool
    right: bool


@lru_cache(maxsize=8)
def _fitted(tokenizer: PreTrainedTokenizerBase, name: str, choices: Choices) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise UserError(
            f"template '{name}' is the tokenizer's own, but '{tokenizer.name_or_path}' has no chat template. Set "
            "llm.template to chatml, gemma_chat, phi3, llama3 or another one by name."
        )
    added = frozenset(tokenizer.get_added_vocab())
    layouts = _Layouts(tokenizer, added, choices)
    return _FittedNative(name, "", _end_token(layouts.complete(1, with_system=False)), layouts, added)


def _end_token(layout: Sequence[Segment | _Slot]) -> str | None:
    """The token that closes the last content."""
    last = max((number for number, part in enumerate(layout) if isinstance(part, _Slot)), default=-1)
    return next((part.text for part in layout[last + 1 :] if isinstance(part, Segment) and part.special), None)


@dataclass(frozen=True)
class _FittedNative(ChatTemplate):
    """A tokenizer's chat template. An empty `system` leaves the matter to the template, which may have its own."""

    layouts: _Layouts
    added: frozenset[str]

    @property
    def tokens(self) -> frozenset[str]:
        return self.added

    @property
    def bos(self) -> bool:
        return False  # the template itself says whether there is one

    def fitted(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return self

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        contents: list[list[Segment]] = [[Segment(system)]] if system else []
        for turn in turns:
            contents.append(user_segments(turn))
            if turn.assistant is not None:
                contents.append([Segment(turn.assistant, supervised=True)])
        is_open = turns[-1].assistant is None
        layout = (self.layouts.prompt if is_open else self.layouts.complete)(len(turns), with_system=bool(system))
        segments: list[Segment] = []
        for part in layout:
            segments += [part] if isinstance(part, Segment) else _placed(contents[part.index], part)
        return segments


def _placed(content: list[Segment], slot: _Slot) -> list[Segment]:
    """Content at its place, stripped where the template strips."""
    placed = list(content)
    if not slot.left and placed[0].special is None:
        placed[0] = Segment(placed[0].text.lstrip(), placed[0].supervised)
    if not slot.right and placed[-1].special is None:
        placed[-1] = Segment(placed[-1].text.rstrip(), placed[-1].supervised)
    return placed


class _Layouts:
    """Layouts of one tokenizer's template by shape of conversation, each rendered and checked once."""

    def __init__(self, tokenizer: Any, added: frozenset[str], choices: Choices) -> None:
        self._tokenizer = tokenizer
        self._added = added
        self._choices = choices
        self._known: dict[tuple[int, bool, bool], list[Segment | _Slot]] = {}

    def complete(self, num_turns: int, with_system: bool) -> list[Segment | _Slot]:
        """Layout of a conversation whose every turn is answered; answers' end tokens are supervised.

        Raises:
            UserError: the template fails, loses a message, rewrites earlier turns, or closes answers without a token.
        """
        key = (num_turns, with_system, False)
        if key not in self._known:
            text = self._text(num_turns, with_system, is_open=False)
            cuts = []  # where answers begin: what stands between a prompt and the answer's words is for the model to write
            for turns in range(1, num_turns + 1):
                prompt = self._text(turns, with_system, is_open=True)
                cuts.append(len(prompt))
                if not text.startswith(prompt):
                    raise self._refusal(
                        f"in a conversation of {num_turns} turns it does not write the prompt of turn {turns} as it "
                        "writes the prompt alone, so a model would be trained on another text than it is asked with",
                        "Use a template by name, or data with one turn a conversation.",
                    )
            parts = self._parts(text, 2 * num_turns + with_system, cuts)
            self._known[key] = self._supervised(parts, with_system)
        return self._known[key]

    def prompt(self, num_turns: int, with_system: bool) -> list[Segment | _Slot]:
        """Layout of a conversation whose last turn waits for its answer."""
        key = (num_turns, with_system, True)
        if key not in self._known:
            self.complete(num_turns, with_system)  # also checks that the prompt is what training shows
            text = self._text(num_turns, with_system, is_open=True)
            self._known[key] = self._parts(text, 2 * num_turns + with_system - 1, [])
        return self._known[key]

    def _text(self, num_turns: int, with_system: bool, is_open: bool) -> str:
        from jinja2 import TemplateError

        roles = (["system"] if with_system else []) + ["user", "assistant"] * num_turns
        roles = roles[:-1] if is_open else roles
        messages = [
            {"role": role, "content": f"{_SPACE}{_OPEN}{index}{_CLOSE}{_SPACE}"} for index, role in enumerate(roles)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_open, **_VARIABLES
            )
        except (TemplateError, TypeError, ValueError) as error:
            what = " with a system message" if with_system else ""
            raise self._refusal(
                f"it cannot render a conversation of {num_turns} turns{what} ({error})",
                "Use a template by name (gemma_chat puts a system message before the first question).",
            ) from error
        return str(text)

    def _parts(self, text: str, count: int, cuts: Sequence[int]) -> list[Segment | _Slot]:
        """Cut a rendered text at its `count` placeholders and at `cuts`; structure behind a cut is supervised."""
        parts: list[Segment | _Slot] = []
        end, found = 0, []
        for match in _PLACEHOLDER.finditer(text):
            cut = next((cut for cut in cuts if end <= cut <= match.start()), match.start())
            parts += structure(text[end:cut], self._added)
            parts += structure(text[cut : match.start()], self._added, supervised=True)
            found.append(int(match[2]))
            parts.append(_Slot(found[-1], bool(match[1]), bool(match[3])))
            end = match.end()
        parts += structure(text[end:], self._added)
        if found != list(range(count)):
            raise self._refusal(
                f"of {count} messages it writes {len(found)}, in the order {found}",
                "Use a template by name.",
            )
        return parts

    def _supervised(self, parts: list[Segment | _Slot], with_system: bool) -> list[Segment | _Slot]:
        """Mark what closes an answer: everything up to its end token."""
        marked = list(parts)
        for number, part in enumerate(parts):
            if not isinstance(part, _Slot) or (part.index - with_system) % 2 == 0 or part.index < with_system:
                continue
            closing = list(range(number + 1, len(parts)))
            for place in closing:
                behind = parts[place]
                if isinstance(behind, _Slot):
                    raise self._no_end()
                marked[place] = Segment(behind.text, True, behind.special)
                if behind.special:
                    break
            else:
                raise self._no_end()
        return marked

    def _no_end(self) -> UserError:
        return self._refusal("it closes answers with no special token, so a model would never learn to stop", "")

    def _refusal(self, why: str, advice: str) -> UserError:
        fitting = ", ".join(fitting_templates(self._tokenizer, self._choices)) or "none"
        return UserError(
            f"the chat template of the tokenizer '{self._tokenizer.name_or_path}' cannot be used for training: {why}. "
            f"{advice or 'Use a template by name.'} Set llm.template or the stage's template; those that fit: {fitting}."
        )
