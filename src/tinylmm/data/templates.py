"""The layouts of chat templates: a conversation as segments of structure and content.

Texts are byte-exact with TinyLLaVA Factory (main), TinyLLaVABench and LLaVA (`conversation.py`), and with the chat templates
that Qwen, Gemma, Phi-3 and Llama-3 publish; see tests/golden/test_chat_templates.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tinylmm.data.segments import IMAGE, Rendered, Segment, Turn, encode, structure, token_id
from tinylmm.data.slots import user_segments
from tinylmm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Choices = tuple[tuple[str, frozenset[str]], ...]
"""Names of templates that end answers with a token, each with its structural tokens."""


@dataclass(frozen=True)
class ChatTemplate(ABC):
    """A layout of conversations; subclasses say in `segments` what stands where.

    Attributes:
        name: key in TEMPLATES, stored in checkpoints.
        system: the system message of conversations that bring none of their own.
        eos: text of the token that closes each answer; None for none.
        choices: the templates that may be named where this one does not fit a tokenizer.
    """

    name: str
    system: str
    eos: str | None
    choices: Choices = field(default=(), kw_only=True, compare=False, repr=False)

    @property
    def tokens(self) -> frozenset[str]:
        """Structural tokens: each must be one token of the tokenizer."""
        return frozenset(filter(None, [self.eos]))

    @property
    def bos(self) -> bool:
        """Whether ids begin with the tokenizer's BOS where the tokenizer adds one to any text."""
        return True

    def fitted(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Return the template as it is with this tokenizer; most are the same with every one.

        Raises:
            UserError: the tokenizer does not fit the template.
        """
        missing = sorted(token for token in self.tokens if token_id(tokenizer, token) is None)
        if not missing:
            return self
        fitting = fitting_templates(tokenizer, self.choices)
        texts = ", ".join(f"'{token}'" for token in missing)
        use = "ends answers with" if missing == [self.eos] else "needs"
        raise UserError(
            f"template '{self.name}' does not fit the tokenizer '{tokenizer.name_or_path}': it {use} {texts}, which "
            f"{'is no token' if len(missing) == 1 else 'are no tokens'} there (the tokenizer's own EOS is "
            f"'{tokenizer.eos_token}'). Templates that fit: {', '.join(fitting) or 'none'}. "
            "Set llm.template or the stage's template."
        )

    def text(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Return the exact text, with `<image>` at image slots and structural tokens as their text."""
        return "".join(segment.text for segment in self.segments(turns, self.system if system is None else system))

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Rendered:
        """Return ids and labels of a complete conversation; answers and their end tokens are supervised in every turn.

        Args:
            system: the conversation's own system message; None takes the template's.

        Raises:
            UserError: the tokenizer is a slow one, or does not fit the template.
            ValueError: there is no turn, or one without an answer.
        """
        if not turns or any(turn.assistant is None for turn in turns):
            raise ValueError("render() takes complete turns; render_prompt() takes an open one")
        return self._encode(turns, tokenizer, system)

    def render_prompt(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system: str | None = None
    ) -> list[int]:
        """Return the ids after which the model writes the last turn's answer.

        Raises:
            UserError: as `render`.
            ValueError: the last turn has an answer already, or an earlier one has none.
        """
        if not turns or turns[-1].assistant is not None or any(turn.assistant is None for turn in turns[:-1]):
            raise ValueError("render_prompt() takes turns of which exactly the last has no answer")
        return self._encode(turns, tokenizer, system).input_ids

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids that end a generated answer: the end token of the fitted template first, then the tokenizer's own EOS.

        This is the only rule of what ends an answer; whoever generates, or writes a generation config, asks here.
        """
        found = [token_id(tokenizer, self.fitted(tokenizer).eos), tokenizer.eos_token_id]
        return list(dict.fromkeys(token for token in found if isinstance(token, int)))

    @abstractmethod
    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        """Lay a conversation out. A turn without an answer ends where the answer would begin."""

    def _encode(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system: str | None) -> Rendered:
        template = self.fitted(tokenizer) if tokenizer.is_fast else self  # a slow one has its own message
        segments = template.segments(turns, template.system if system is None else system)
        return encode(segments, tokenizer, template.tokens, template.bos)

    def _end(self) -> list[Segment]:
        return [] if self.eos is None else [Segment(self.eos, supervised=True, special="token")]


def fitting_templates(tokenizer: PreTrainedTokenizerBase, choices: Choices) -> list[str]:
    """Names of the templates whose structural tokens the tokenizer has."""
    return [name for name, tokens in choices if all(token_id(tokenizer, token) is not None for token in tokens)]


@dataclass(frozen=True)
class VicunaTemplate(ChatTemplate):
    """`{system} USER: {question} ASSISTANT: {answer}{eos}`, turns joined by nothing."""

    cue: str = " ASSISTANT:"
    """What stands between question and answer; the prompt ends with it, without a space behind."""

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        segments = [Segment(f"{system} ")] if system else []
        for turn in turns:
            segments += [Segment("USER: "), *user_segments(turn), Segment(self.cue)]
            if turn.assistant is not None:
                # The loss begins at the space before the answer: it is part of the answer's first token.
                segments += [Segment(f" {turn.assistant}", supervised=True), *self._end()]
        return segments


@dataclass(frozen=True)
class HFLlavaTemplate(VicunaTemplate):
    """The form of transformers' LLaVA cards, `USER: <image>\\n{question}\\nASSISTANT:`; ends with the tokenizer's own EOS.

    `text` shows the EOS as `</s>`, unless the template is `fitted`.
    """

    def fitted(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        own = tokenizer.eos_token
        if own is None:
            raise UserError(
                f"template '{self.name}' ends answers with the tokenizer's own EOS, but '{tokenizer.name_or_path}' has "
                "none. Set llm.template or the stage's template to one with an end token that it has."
            )
        return replace(self, eos=str(own))


@dataclass(frozen=True)
class CaptionTemplate(ChatTemplate):
    """Pretraining on captions: `<image>{caption}` and a newline. The question's words are thrown away, there is no EOS.

    Unlike the Factory's, it gives a turn exactly the image slots that its question has. The Factory adds one to every
    turn, also of text-only and multi-turn data, which then has more slots than images.
    """

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        segments: list[Segment] = []
        for turn in turns:
            segments += [IMAGE] * turn.num_images
            if turn.assistant is not None:
                segments.append(Segment(f"{turn.assistant}\n", supervised=True))
        return segments


@dataclass(frozen=True)
class Llama2Template(ChatTemplate):
    """LLaVA's LLAMA_2 style: `[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{question} [/INST] {answer} </s>`.

    Every later turn begins with a `<s>` of its own; the first one's is the BOS that the tokenizer adds.
    """

    @property
    def tokens(self) -> frozenset[str]:
        return frozenset({"<s>", "</s>"})

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        segments: list[Segment] = []
        for number, turn in enumerate(turns):
            segments += [Segment("<s>", special="token")] if number else []
            opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not number else ""
            segments += [Segment(f"[INST] {opening}"), *user_segments(turn), Segment(" [/INST]")]
            if turn.assistant is not None:
                segments += [Segment(f" {turn.assistant} ", supervised=True), *self._end()]
        return segments


@dataclass(frozen=True)
class TinyLlamaTemplate(ChatTemplate):
    """TinyLLaVABench's TINY_LLAMA style: `<s><|system|>\\n{system}\\n<|user|>\\n{question}\\n<|assistant|>\\n{answer}</s>`.

    The Bench's own code loses the leading `<s><` to a strip by characters; `as_published` gives what its checkpoints saw.
    """

    as_published: bool = False
    markers: tuple[str, ...] = ()
    """Role words that are tokens of the tokenizer; in TinyLlama's they are text."""

    @property
    def tokens(self) -> frozenset[str]:
        return frozenset({"<s>", "</s>", *self.markers})

    def fitted(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        words = ("<|system|>", "<|user|>", "<|assistant|>")
        markers = tuple(word for word in words if token_id(tokenizer, word) is not None)
        return ChatTemplate.fitted(replace(self, markers=markers), tokenizer)

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        segments: list[Segment] = []
        for number, turn in enumerate(turns):
            if number or not self.as_published:
                segments.append(Segment("<s>", special="token"))
            if not number:
                segments += structure(f"{'' if self.as_published else '<'}|system|>\n", self.markers)
                segments.append(Segment(f"{system}\n"))
            segments += [*structure("<|user|>\n", self.markers), *user_segments(turn)]
            segments += structure("\n<|assistant|>\n", self.markers)
            if turn.assistant is not None:
                segments += [Segment(turn.assistant, supervised=True), *self._end()]
        return segments


@dataclass(frozen=True)
class RoleTemplate(ChatTemplate):
    """Every message in a block: an opening with the role's name, the content, the end token, a closing text.

    Attributes:
        opening: with `{role}` in it.
        markers: structural tokens of openings.
        closing: behind the end token; not supervised.
        roles: names of system, user and assistant; without a system role, its message opens the first question.
        start: BOS, where it belongs to the format.
        strips: white space around contents is dropped, as the published templates do.
    """

    opening: str = ""
    markers: tuple[str, ...] = ()
    closing: str = ""
    roles: tuple[str | None, str, str] = ("system", "user", "assistant")
    start: str = ""
    strips: bool = False

    @property
    def tokens(self) -> frozenset[str]:
        return frozenset(filter(None, [*self.markers, self.eos, self.start]))

    def segments(self, turns: Sequence[Turn], system: str) -> list[Segment]:
        system_role, user_role, assistant_role = self.roles
        system = system.strip() if self.strips else system
        segments = structure(self.start, self.tokens)
        if system and system_role is not None:
            segments += self._block(system_role, [Segment(system)])
        for number, turn in enumerate(turns):
            question = user_segments(turn, self.strips)
            if system and system_role is None and not number:
                question.insert(0, Segment(f"{system}\n\n"))
            segments += self._block(user_role, question)
            segments += structure(self.opening.format(role=assistant_role), self.tokens)
            if turn.assistant is not None:
                answer = turn.assistant.strip() if self.strips else turn.assistant
                segments += [Segment(answer, supervised=True), *self._end(), *structure(self.closing, self.tokens)]
        return segments

    def _block(self, role: str, content: list[Segment]) -> list[Segment]:
        opening = structure(self.opening.format(role=role), self.tokens)
        return [*opening, *content, *structure(f"{self.eos or ''}{self.closing}", self.tokens)]
