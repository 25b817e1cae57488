"""Batched greedy generation over many questions; each image passes the tower once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinylmm.data.chat import IMAGE_TOKEN_ID, ChatTemplate, Turn
from tinylmm.errors import StoppedError
from tinylmm.evaluation.questions import Question
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import encode_images
from tinylmm.stop import stop_requested

ENCODE_IMAGES = 64


def image_features(model: LMM, names: Sequence[str], load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Encode each image once: name -> (1, P, Dv), or (T, P, Dv) of its tiles where images are tiled, on the CPU."""
    features: dict[str, Tensor] = {}
    for first in range(0, len(names), ENCODE_IMAGES):
        chunk = names[first : first + ENCODE_IMAGES]
        views = [pixels if model.tiled else pixels[None] for pixels in map(load, chunk)]
        encoded = encode_images(model.vision_tower, torch.cat(views)).cpu()
        features |= dict(zip(chunk, encoded.split([len(view) for view in views]), strict=True))
    return features


def answer_questions(
    model: LMM,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    questions: Sequence[Question],
    features: dict[str, Tensor] | None,
    max_new_tokens: int,
    batch: int,
    sizes: dict[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Answer greedily; returns the texts in the order of `questions`.

    Args:
        features: image name -> (1 or T, P, Dv), or None to ask without any image (blind baseline).
        batch: questions generated at once, of similar length.
        sizes: image name -> width and height; needed where images are tiled.

    Raises:
        StoppedError: a stop was asked for between two batches.
    """
    prompts = [
        _prompt(question, template, tokenizer, _tokens(model, sizes, question.image), features is not None)
        for question in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for first in range(0, len(order), batch):
        if stop_requested():
            raise StoppedError(f"stopped after {first} of {len(order)} questions; the same command asks them again")
        rows = order[first : first + batch]
        names = [questions[i].image for i in rows]
        stacked = None if features is None else torch.cat([features[name] for name in names])
        shapes = torch.tensor([sizes[name] for name in names]) if stacked is not None and sizes is not None else None
        answers = model.generate(
            [prompts[i] for i in rows],
            stacked,
            max_new_tokens,
            int(tokenizer.eos_token_id),
            int(tokenizer.pad_token_id),
            shapes,
        )
        for row, ids in zip(rows, answers, strict=True):
            texts[row] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return texts


def _tokens(model: LMM, sizes: dict[str, tuple[int, int]] | None, name: str) -> int:
    return model.image_tokens if sizes is None else model.tokens_of(*sizes[name])


def _prompt(
    question: Question, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, image_tokens: int, with_image: bool
) -> list[int]:
    user = f"<image>\n{question.text}" if with_image else question.text
    ids = template.render_prompt([Turn(user, None)], tokenizer)
    return [token for i in ids for token in ([i] * image_tokens if i == IMAGE_TOKEN_ID else [i])]
