"""The decoding loop over a key-value cache, for batches that begin together and for a row alone, greedy and drawn.

Rows that come and go are stepped by `continuous.py`, whose answers are held to those of `decode_alone`.

Shapes: B rows, S tokens behind a shared prefix, V the vocabulary, Dl the LLM's width.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tinylmm.generation.cache import select_rows

T = TypeVar("T")
Choose = Callable[[Tensor, Sequence[int], Sequence[Sequence[int]]], tuple[Tensor, list[bool]]]
"""What `choose.Chooser` is: logits (B, V), the rows they belong to and all answers so far -> tokens and doubts."""


@dataclass
class Continued:
    """What one row was continued with.

    Attributes:
        ids: new token ids, without the end token.
        steps: tokens computed, the end token counted in.
        seconds: from the batch's start until this row was done.
        tied: the row met a near-tie and `ids` is not to be used.
    """

    ids: list[int]
    steps: int
    seconds: float
    tied: bool = False


@dataclass(frozen=True)
class Start:
    """What B rows begin with.

    Attributes:
        cache: of the `past` tokens in front of every row (B rows); it is used up.
        past: tokens in the cache.
        embeddings: (B, S, Dl), rows shorter than S with padding on the left.
        lengths: how many of the S tokens of each row are real; if all are, no mask is made.
    """

    cache: DynamicCache
    past: int
    embeddings: Tensor
    lengths: Sequence[int]

    def places(self) -> tuple[Tensor | None, Tensor]:
        """Attention mask (B, past + S), None where there is no padding, and positions (B, S) that count real tokens only."""
        device, (rows, width) = self.embeddings.device, self.embeddings.shape[:2]
        pads = torch.tensor([width - length for length in self.lengths], device=device)
        mask: Tensor | None = None
        if bool(pads.any()):
            real = torch.arange(width, device=device) >= pads[:, None]
            mask = torch.cat([real.new_ones(rows, self.past), real], dim=1).long()
        return mask, self.past + (torch.arange(width, device=device) - pads[:, None]).clamp(min=0)


@torch.no_grad()
def decode(
    llm: nn.Module,
    start: Start,
    choose: Choose,
    ends: frozenset[int],
    limits: Sequence[int],
    check: Callable[[], None] = lambda: None,
) -> Iterator[list[Continued]]:
    """Continue rows until each has ended; yield them after every token, the same objects each time.

    Args:
        choose: made for these rows.
        ends: token ids that end an answer.
        limits: most new tokens of each row.
        check: called before every token; raises to stop.
    """
    began = time.perf_counter()
    cache, (mask, positions) = start.cache, start.places()
    found = [Continued([], 0, 0.0) for _ in limits]
    live = list(range(len(found)))
    inputs: dict[str, Any] = {"inputs_embeds": start.embeddings}
    while True:
        check()
        logits = next_logits(llm, inputs, mask, positions, cache)
        tokens, ties = choose(logits, live, [answer.ids for answer in found])
        keep = []
        for place, (row, token, tied) in enumerate(zip(live, tokens.tolist(), ties, strict=True)):
            if row < 0:
                continue
            answer = found[row]
            answer.steps, answer.seconds, answer.tied = answer.steps + 1, time.perf_counter() - began, tied
            ended = tied or token in ends
            if not ended:
                answer.ids.append(token)
            if ended or len(answer.ids) == limits[row]:
                live[place] = -1
            else:
                keep.append(place)
        yield found
        if not keep:
            return
        positions = positions[:, -1:] + 1
        if 2 * len(keep) <= len(live):  # most rows are done: go on with the others alone
            index = torch.tensor(keep, device=tokens.device)
            cache, tokens, positions = select_rows(cache, index), tokens[index], positions[index]
            mask = None if mask is None else mask[index]
            live = [live[place] for place in keep]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        inputs = {"input_ids": tokens[:, None]}


def decode_alone(
    llm: nn.Module,
    embeddings: Tensor,
    choose: Choose,
    ends: frozenset[int],
    limit: int,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Continued]:
    """Continue one row (1, L, Dl) alone, with no mask and transformers' own cache: what it says is the definition.

    Yields the row after every token, the same object each time.
    """
    start = Start(DynamicCache(config=llm.config), 0, embeddings, [embeddings.shape[1]])
    for (answer,) in decode(llm, start, choose, ends, [limit], check):
        yield answer


def last(steps: Iterator[T]) -> T:
    """What an iterator yields last: rows that have ended."""
    return deque(steps, maxlen=1)[0]


def next_logits(
    llm: nn.Module, inputs: dict[str, Any], mask: Tensor | None, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """(B, V) logits behind the last token of each row."""
    return last_logits(llm, inputs, mask, positions, cache, 1)[:, -1]


def last_logits(
    llm: nn.Module, inputs: dict[str, Any], mask: Tensor | None, positions: Tensor, cache: DynamicCache, count: int
) -> Tensor:
    """(B, `count`, V) logits behind the last tokens of each row."""
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    if _keeps_logits(type(llm).forward):
        options["logits_to_keep"] = count
    logits: Tensor = llm(**inputs, **options, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return logits[:, -count:]


@lru_cache(maxsize=8)
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    """Whether a model can be asked for the last token's logits alone."""
    parameters = inspect.signature(forward).parameters
    return "logits_to_keep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
