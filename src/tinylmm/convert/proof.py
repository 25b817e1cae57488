"""Proof that what was exported gives what our model gives: logits over a row with an image, token ids of some prompts."""

from __future__ import annotations

from typing import Any

import torch

from tinylmm.constants import IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.slots import expand, positions_of
from tinylmm.errors import IntegrityError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.lmm import LMM

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest of ours above 1, that counts as rounding (fp32)."""
_PROBES = (
    [Turn(f"{IMAGE_SLOT}\nWhat is it?", None)],
    [Turn(IMAGE_SLOT, None)],
    [Turn(f"{IMAGE_SLOT}\nA?", "b"), Turn("Why?", None)],
)


@torch.no_grad()
def logit_difference(model: LMM, exported: Any, image_id: int, rows: int) -> float:
    """Largest difference of logits over a row of text, one random image, and text.

    Raises:
        IntegrityError: it is above TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(rows, image_id), (1, 8), generator=generator)
    slots = torch.full((1, model.image_tokens), IMAGE_TOKEN_ID)
    row = torch.cat([ids[:, :4], slots, ids[:, 4:]], dim=1)
    pixels = torch.randn(1, 3, model.vision_tower.image_size, model.vision_tower.image_size, generator=generator)
    embeddings, _ = model.embed(row, pixels, None)
    ours = model.llm(inputs_embeds=embeddings).logits
    theirs = exported(input_ids=row.masked_fill(row == IMAGE_TOKEN_ID, image_id), pixel_values=pixels).logits[
        ..., :rows
    ]
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise IntegrityError(f"the exported model's logits differ from ours by {difference:.1e}. Nothing was written.")
    return difference


def token_notes(processor: Any, loaded: LoadedModel) -> list[str]:
    """Compare the processor's ids of some prompts with ours; a difference is a note, not an error."""
    template, slots = get_template(loaded.model.template).fitted(loaded.tokenizer), loaded.model.image_tokens
    for turns in _PROBES:
        ours = template.render_prompt(turns, loaded.tokenizer)
        text = template.text(turns).replace(IMAGE_SLOT, IMAGE_SLOT * slots)
        has_bos = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
        theirs = processor.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]  # as apply_chat_template does
        expanded = expand(ours, positions_of(ours, [slots] * ours.count(IMAGE_TOKEN_ID)))
        if theirs != [processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in expanded]:
            return [
                "the tokenizer, given the whole prompt as text, splits it into other tokens than the model was trained on"
            ]
    return []
