"""Our own engine's answers to the questions that another program is asked, and how likely each of their tokens was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.convert.asking import LIKELIEST, Answered, Question
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.checkpoint import LoadedModel

ROWS = 8
"""Questions that are answered together."""


def prompts_of(loaded: LoadedModel, questions: Sequence[Question]) -> list[Prompt]:
    """The prompts, with as many placeholders as each picture takes; they are named by their place.

    Raises:
        UserError: one of them leaves no room for an answer.
    """
    maker = PromptMaker(get_template(loaded.model.template), loaded.tokenizer)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    found = []
    for number, question in enumerate(questions):
        counts = [loaded.model.image_tokens] * len(question.images)
        keys = list(map(str, question.images))
        prompt = maker.prompt(str(number), [Turn(question.with_slots, None)], keys, counts)
        if limit is not None and len(prompt.ids) >= limit:
            raise UserError(
                f"--verify: a question is {len(prompt.ids)} tokens long with its pictures, and the model reads {limit} at most."
            )
        found.append(prompt)
    return found


def ask_ours(
    loaded: LoadedModel, questions: Sequence[Question], tokens: int, beside: Sequence[Answered] | None = None
) -> list[Answered]:
    """Answer greedily, then read how likely each token of the answers was, and which others were likely there.

    Args:
        loaded: in fp32 on the CPU.
        tokens: most new tokens of an answer.
        beside: another model's answers; log-probabilities are then those of its tokens, along its answers.
    """
    model, maker = loaded.model.eval(), PromptMaker(get_template(loaded.model.template), loaded.tokenizer)
    load = partial(_pixels, ImageTransform.of(loaded.description.image))
    prompts = prompts_of(loaded, questions)
    engine = Engine(model, load, maker.ends, Sampling(max_new_tokens=tokens), rows=ROWS)
    answers = {reply.item_id: reply.ids for batch in engine.replies(prompts) for reply in batch}
    found = []
    for number, prompt in enumerate(prompts):
        ids = tuple(answers[prompt.item_id])
        other = None if beside is None else beside[number]
        log_probs = _along(loaded, prompt, ids if other is None else other.ids or (), load)
        looked_at = [_likeliest(row) for row in log_probs] if other is None else list(map(list, other.log_probs))
        places = [
            dict(zip(tokens, row[tokens].tolist(), strict=True))
            for tokens, row in zip(looked_at, log_probs, strict=True)
        ]
        found.append(Answered(len(prompt.ids), maker.text(ids).strip(), tuple(places), ids, prompt.ids))
    return found


@torch.no_grad()
def _along(loaded: LoadedModel, prompt: Prompt, answer: Sequence[int], load: Callable[[str], Tensor]) -> Tensor:
    """(1 + tokens of the answer, vocabulary): log-probabilities behind the prompt and behind each token of the answer."""
    model, row = loaded.model, torch.tensor([[*prompt.ids, *answer]])
    pixels = torch.stack([load(key) for key in prompt.images]) if prompt.images else None
    logits = model.llm(inputs_embeds=model.embed(row, pixels, None)[0]).logits[0, len(prompt.ids) - 1 :]
    return logits.float().log_softmax(-1)


def _pixels(transform: ImageTransform, key: str) -> Tensor:
    with Image.open(key) as image:
        return transform(image.convert("RGB"))


def _likeliest(log_probs: Tensor) -> list[int]:
    return log_probs.topk(min(LIKELIEST, len(log_probs))).indices.tolist()


def rows_of(loaded: LoadedModel) -> int:
    """Rows of the vocabulary."""
    return int(loaded.model.llm.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def with_slots_closed(ids: Sequence[int], image_id: int) -> tuple[int, ...]:
    """Another program's ids of a prompt with our placeholder in place of its own."""
    return tuple(IMAGE_TOKEN_ID if token == image_id else token for token in ids)
