"""From questions to prompts and from ids back to text, by the chat template as it is fitted to the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tinylmm.data.chat import ChatTemplate, Turn
from tinylmm.data.slots import expand, positions_of


@dataclass(frozen=True)
class Prompt:
    """What to ask.

    Attributes:
        item_id: names the answer.
        ids: token ids with as many placeholders as each image takes.
        images: keys of the images, in their order.
        limit: most new tokens, where it is fewer than the engine's.
    """

    item_id: str
    ids: tuple[int, ...]
    images: tuple[str, ...] = ()
    limit: int | None = None


class PromptMaker:
    """Makes prompts for one model and reads its answers.

    Attributes:
        ends: token ids that end an answer.

    Raises:
        UserError: the tokenizer does not fit the template.
    """

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.ends = frozenset(template.stop_ids(tokenizer))

    def prompt(
        self,
        item_id: str,
        turns: Sequence[Turn],
        images: Sequence[str] = (),
        image_tokens: Sequence[int] = (),
        system: str | None = None,
    ) -> Prompt:
        """Render a conversation whose last turn is open (`data.slots.question` makes turns).

        Args:
            images: keys of the images of all turns, in their order, and
            image_tokens: how many placeholders each takes.
            system: the conversation's own system message; None takes the template's.

        Raises:
            UserError: the tokenizer does not fit the template.
        """
        ids = self.template.render_prompt(turns, self.tokenizer, system)
        return Prompt(item_id, tuple(expand(ids, positions_of(ids, image_tokens))), tuple(images))

    def text(self, ids: Sequence[int]) -> str:
        """Text of an answer's ids, white space around it included."""
        # Cleaning up would change what stands before a later token: a stream could not take it back.
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
