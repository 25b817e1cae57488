"""What our own engine makes of prompts that other programs are asked, and pictures to ask about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.builders import IMAGE_SIZE
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.transform import ImageTransform
from tinylmm.models.checkpoint import LoadedModel


def row_of(loaded: LoadedModel, turns: list[Turn]) -> list[int]:
    """Ids of a prompt, with as many of an image as it has tokens."""
    ids = get_template(loaded.model.template).fitted(loaded.tokenizer).render_prompt(turns, loaded.tokenizer)
    slots = [IMAGE_TOKEN_ID] * loaded.model.image_tokens
    return [token for number in ids for token in (slots if number == IMAGE_TOKEN_ID else [number])]


def first_chances(loaded: LoadedModel, turns: list[Turn], image: Path | None) -> torch.Tensor:
    """Probabilities of the answer's first token."""
    model = loaded.model.eval()
    row = torch.tensor([row_of(loaded, turns)])
    pixels = None if image is None else ImageTransform.of(loaded.description.image)(Image.open(image))[None]
    with torch.no_grad():
        return model.llm(inputs_embeds=model.embed(row, pixels, None)[0]).logits[0, -1].softmax(-1)


def noise(folder: Path, count: int) -> list[Path]:
    """Pictures of the tiny towers' size, always the same ones: llama.cpp prepares others in a way of its own."""
    draw = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(path)
    return paths
