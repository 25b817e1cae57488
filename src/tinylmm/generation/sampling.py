"""The decoding loop: a batch of prompts in, new tokens out one step at a time, over the LLM's KV cache."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinylmm.errors import UserError
from tinylmm.models.lmm import LMM


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: an answer's length at most.
        temperature: 0 is greedy (the default); above 0 tokens are drawn, and the fields below count.
        top_p: draw from the smallest set of tokens with this much probability.
        top_k: draw from this many tokens at most; 0 for all.
        repetition_penalty: divides the logits of tokens in the answer so far; 1 leaves them. Also counts when greedy.
        seed: of the draws; every row of a batch has its own generator, so a batch draws what single calls draw.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (fine, allowed) in ranges.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}.")

    def processors(self) -> LogitsProcessorList:
        """transformers' processors for these settings, in its order."""
        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature:
            found.append(TemperatureLogitsWarper(self.temperature))
            found += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            found += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList(found)


def generate_tokens(
    model: LMM,
    prompts: list[list[int]],
    features: Tensor | None,
    sampling: Sampling,
    ends: set[int],
    pad_id: int,
    image_sizes: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, each row's new token, None for rows that have ended; stops when all have.

    Args:
        prompts: token ids, with Q placeholders an image.
        features: (N, P, Dv), the tower's output in the order of the placeholders over all prompts; None without images.
        sampling: how to choose.
        ends: tokens that end an answer; they are not yielded.
        pad_id: stands at the left of shorter prompts.
        image_sizes: (N, 2), where images are tiled; features are then those of all tiles.
    """
    llm: Any = model.llm
    device = next(llm.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.no_grad():
        inputs: dict[str, Any] = {"inputs_embeds": model.embed(ids, None, features, image_sizes)[0]}
    # Positions count real tokens only: transformers would count the padding at the left too.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(llm.forward).parameters else {}
    processors, answers = sampling.processors(), torch.empty(len(prompts), 0, dtype=torch.long, device=device)
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts] if sampling.temperature else []
    ended = [False] * len(prompts)
    cache = None
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad():
            output = llm(
                **inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep
            )
            cache = output.past_key_values
            chosen = _choose(processors(answers, output.logits[:, -1].float()), generators)
        row = [None if done or token in ends else token for done, token in zip(ended, chosen.tolist(), strict=True)]
        ended = [token is None for token in row]
        if all(ended):
            return
        yield row
        answers = torch.cat([answers, chosen[:, None]], dim=1)
        inputs = {"input_ids": chosen[:, None]}
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _choose(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """(R, V) to (R,): the largest, or one draw a row."""
    if not generators:
        return logits.argmax(-1)
    chances = logits.softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(chances, generators, strict=True)])
