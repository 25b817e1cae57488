"""Image slots: where they stand in a question, how many positions each takes. Every reader and writer of them asks here.

The Jinja template of an exported model says the same in its own language, and is proven against `user_segments` when it is
made (`convert/chat_template.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinylmm.constants import IGNORE_INDEX, IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.data.segments import IMAGE, Segment, Turn


def question(text: str, images: int, answer: str | None = None) -> Turn:
    """A question that comes with images.

    A text with a slot for each of them keeps its slots where they are. Otherwise its slots are taken out, and the images
    stand in front, one a line, as LLaVA's scripts put them.
    """
    if not images or text.count(IMAGE_SLOT) != images:
        text = f"{IMAGE_SLOT}\n" * images + text.replace(IMAGE_SLOT, "").strip()
    return Turn(text, answer)


def user_segments(turn: Turn, strips: bool = False) -> list[Segment]:
    """A question's only slot goes in front, and its words on the next line, if there are any; several slots stay in place.

    The first is the rule of TinyLLaVA Factory and LLaVA.

    Args:
        strips: white space around the question is dropped.
    """
    texts = list(turn.texts)
    if len(texts) == 2:
        words = "".join(texts).strip()
        return [IMAGE, Segment(f"\n{words}")] if words else [IMAGE]
    if strips:
        texts[0] = texts[0].lstrip()
        texts[-1] = texts[-1].rstrip()
    segments = [Segment(texts[0])]
    for text in texts[1:]:
        segments += [IMAGE, Segment(text)]
    return segments


def positions_of(ids: Sequence[int], image_tokens: Iterable[int]) -> list[int]:
    """How many positions each id takes: a slot as many as its image, any other id one.

    Args:
        image_tokens: of each image, in the order of the slots.

    Raises:
        ValueError: slots and images differ in number.
    """
    counts = iter(image_tokens)
    try:
        found = [next(counts) if token == IMAGE_TOKEN_ID else 1 for token in ids]
    except StopIteration:
        raise ValueError("there are more image slots than images") from None
    if next(counts, None) is not None:
        raise ValueError("there are fewer image slots than images")
    return found


def learned_within(labels: Sequence[int], positions: Sequence[int], max_length: int) -> int:
    """How many tokens of a sample are trained on once it is cut at `max_length`; 0 means that it teaches nothing.

    The first token of a row is never predicted, so it does not count. An image that the cut would halve goes whole.

    Args:
        positions: of `positions_of` its ids.
    """
    position = count = 0
    for width, label in zip(positions, labels, strict=True):
        if position + width > max_length:
            break
        count += label != IGNORE_INDEX and position > 0
        position += width
    return count


def expand(values: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Repeat each value (ids, or labels that go with them) as often as `positions_of` its id says."""
    return [value for value, count in zip(values, positions, strict=True) for _ in range(count)]
