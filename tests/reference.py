"""Plain generation by transformers, one call for a batch: the reference that the engine's answers are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from tinylmm.models.lmm import LMM


@torch.no_grad()
def generate(
    model: LMM,
    prompts: list[list[int]],
    image_features: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    pad_token_id: int,
    image_sizes: Tensor | None = None,
) -> list[list[int]]:
    """Continue prompts greedily and return the new token ids of each, without the end token.

    Args:
        prompts: token ids, with Q placeholders an image.
        image_features: (N, P, Dv) in the order of the placeholders over all prompts.
        image_sizes: (N, 2), where images are tiled, as in `LMM.forward`.
    """
    device = next(model.llm.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, device=device)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # left padding: every row's next token is at the same place
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        attention[row, width - len(prompt) :] = 1
    embeddings, _ = model.embed(ids, None, image_features, image_sizes)
    new_ids = model.llm.generate(  # type: ignore[operator]
        inputs_embeds=embeddings,
        attention_mask=attention,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return [_until(row, ends) for row in new_ids.tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[:index]
    return ids
