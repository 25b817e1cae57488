"""Questions to compare two programs by: those of a run's own evaluation, or drawn pictures where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tinylmm.convert.asking import Question, Questions
from tinylmm.data.chat import Turn, get_template
from tinylmm.models.checkpoint import LoadedModel

DRAWN = "pictures drawn for the purpose: rectangles, gradients and noise of several sizes"
_WORDS = (
    "What is it?",
    "Describe the picture.",
    "Which colours are there, and where?",
    "Is there a digit in the picture, and what is it?",
    "How many things do you see?",
    "What is in the upper left corner? Answer with one word.",
    "Which is larger: the left or the right half's contrast?",
    "Read what is written there.",
)
_SHAPES = ((1.0, 1.0), (1.6, 1.0), (1.0, 1.4), (0.6, 0.8))
"""Width and height, as multiples of the tower's size."""
TEXT_ALONE = "What can you do?"
TWO = "Is it the same in both pictures?"
_WORDS_OF_A_PROMPT = 160
"""Tokens that a prompt of two pictures has besides them, at most."""


def drawn_questions(loaded: LoadedModel, folder: Path, count: int) -> Questions:
    """Draw pictures into a folder, always the same ones, and ask about each."""
    size, draw = int(loaded.model.vision_tower.image_size), np.random.default_rng(0)
    items = []
    for number in range(count):
        across, down = _SHAPES[number % len(_SHAPES)]
        width, height = max(8, round(size * across)), max(8, round(size * down))
        path = folder / f"{number}.png"
        Image.fromarray(_drawn(draw, width, height)).save(path)
        items.append(Question(_WORDS[number % len(_WORDS)], (path,)))
    return Questions(DRAWN, tuple(items))


def _drawn(draw: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a gradient, rectangles on it, and a little noise."""
    corners = draw.integers(0, 256, (2, 3))
    along = np.linspace(0, 1, width)[None, :, None]
    pixels = np.broadcast_to(corners[0] * (1 - along) + corners[1] * along, (height, width, 3)).copy()
    for _ in range(int(draw.integers(1, 6))):
        left, top = int(draw.integers(0, width - 2)), int(draw.integers(0, height - 2))
        right, bottom = int(draw.integers(left + 1, width)), int(draw.integers(top + 1, height))
        pixels[top:bottom, left:right] = draw.integers(0, 256, 3)
    return np.clip(pixels + draw.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def completed(questions: Questions, loaded: LoadedModel, folder: Path, squared: bool) -> Questions:
    """The questions with one of words alone and one about two pictures, and pictures of the tower's size if they have to be."""
    items = list(questions.items)
    if squared:
        items = _squared(items, int(loaded.model.vision_tower.image_size), folder)
    pictures = list(dict.fromkeys(image for item in items for image in item.images))
    source, left_out = questions.source, list(questions.left_out)
    if TEXT_ALONE in get_template(loaded.model.template).text([Turn(TEXT_ALONE, None)]):
        items.append(Question(TEXT_ALONE))
        source += "; and one question without a picture"
    else:
        left_out.append("No question without a picture was asked: the model's template leaves words out.")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if pictures and (limit is None or 2 * loaded.model.image_tokens + _WORDS_OF_A_PROMPT < limit):
        items.append(Question(TWO, (pictures[0], pictures[-1])))
        source += "; and one about two pictures"
    else:
        left_out.append(
            "No question about two pictures was asked: with both the prompt does not fit the model's context."
        )
    return Questions(source, tuple(items), tuple(left_out))


def _squared(items: Sequence[Question], size: int, folder: Path) -> list[Question]:
    """The questions about pictures resized to `size` x `size`."""
    made: dict[Path, Path] = {}
    for image in (image for item in items for image in item.images if image not in made):
        made[image] = folder / f"square-{len(made)}.png"
        with Image.open(image) as opened:
            opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(made[image])
    return [replace(item, images=tuple(made[image] for image in item.images)) for item in items]
