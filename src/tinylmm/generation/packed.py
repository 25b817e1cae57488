"""Decoding of questions that lie side by side in one row, behind the beginning that they share.

A question a row would need a copy of what an image left in the cache for each question about it, and would read it as often at
every token. Here the beginning stands once, in the first columns of a row; behind it lie the columns of all its questions, and
each sees the beginning and its own. Where a column lies says nothing: its position does, and the mask says who sees it.

Shapes: G rows, K questions of a row at most, S new columns, C columns of the cache, Dl the LLM's width, V the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tinylmm.generation.cache import pick_columns
from tinylmm.generation.decode import Choose, Continued, last_logits

BEGINNING, PADDING = -1, -2
"""Owners of columns that belong to no question: everybody sees the beginning, and no question sees padding."""

SCANTY = 0.5
"""Columns are moved together when questions that go on own less than this share of those behind the beginning."""


@dataclass
class PackedRows:
    """The cache of rows, and whose its columns are.

    Attributes:
        cache: G rows of the `past` tokens that each row's questions share, then of whatever was added; it is used up.
        owner: (G, C), the question that each column belongs to, BEGINNING or PADDING.
        place: (G, C), the position of each column's token.
    """

    llm: nn.Module
    cache: DynamicCache
    past: int
    rows: int
    owner: Tensor = field(init=False)
    place: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = next(self.llm.parameters()).device
        self.place = torch.arange(self.past, device=device).repeat(self.rows, 1)
        self.owner = torch.full_like(self.place, BEGINNING)

    @torch.no_grad()
    def step(self, inputs: dict[str, Tensor], owner: Tensor, place: Tensor, keep: int) -> Tensor:
        """Add columns, and return the logits (G, `keep`, V) behind the last of them.

        Args:
            inputs: `inputs_embeds` (G, S, Dl) or `input_ids` (G, S).
            owner, place: (G, S), of the new columns.
        """
        self.owner = torch.cat([self.owner, owner], dim=1)
        self.place = torch.cat([self.place, place], dim=1)
        theirs = (self.owner[:, None] == owner[:, :, None]) & (self.place[:, None] <= place[:, :, None])
        seen = theirs | (self.owner[:, None] == BEGINNING)
        dtype = next(self.llm.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return last_logits(self.llm, inputs, mask[:, None], place, self.cache, keep)

    def tidy(self, live: Sequence[Sequence[int]], owned: Sequence[int]) -> list[int] | None:
        """Let go of what only questions that have ended own, if that is much; returns the rows that stay, None for all.

        Args:
            live: the questions of each row that go on, and
            owned: how many columns are theirs.
        """
        kept = [row for row, questions in enumerate(live) if questions]
        columns = max(owned)
        if len(kept) > SCANTY * len(live) and columns > SCANTY * (self.owner.shape[1] - self.past):
            return None
        device = self.owner.device
        rows = torch.tensor(kept, device=device)
        going = torch.tensor([question for questions in live for question in questions], device=device)
        used = torch.isin(self.owner[rows, self.past :], going)
        # A stable sort brings the columns that are used in front, in their order.
        order = (~used).int().argsort(dim=1, stable=True)[:, :columns]
        beginning = torch.arange(self.past, device=device).expand(len(kept), -1)
        picked = torch.cat([beginning, order + self.past], dim=1)
        unused = torch.cat([torch.zeros_like(beginning).bool(), ~used.gather(1, order)], dim=1)
        self.owner = self.owner[rows[:, None], picked].masked_fill(unused, PADDING)
        self.place = self.place[rows[:, None], picked]
        self.cache = pick_columns(self.cache, rows, picked)
        return kept


@torch.no_grad()
def decode_packed(
    packed: PackedRows,
    rows: Sequence[Sequence[Sequence[int]]],
    embed: Callable[[Sequence[Sequence[int]]], Tensor],
    choose: Choose,
    ends: frozenset[int],
    limits: Sequence[int],
    check: Callable[[], None] = lambda: None,
) -> Iterator[list[Continued]]:
    """Continue the questions of all rows until each has ended; yield them after every token, the same objects each time.

    Args:
        rows: of each row its questions, each the ids behind the beginning, one at least.
        embed: token ids (G, S) as lists -> (G, S, Dl).
        choose: made for all questions, numbered in their order.
        ends: token ids that end an answer.
        limits: most new tokens of each question.
        check: called before every token; raises to stop.
    """
    began = time.perf_counter()
    texts = [list(question) for row in rows for question in row]
    found = [Continued([], 0, 0.0) for _ in texts]
    numbers = iter(range(len(texts)))
    live = [[next(numbers) for _ in row] for row in rows]
    ids, owner, place = _laid_out(live, texts, packed.past)
    inputs = {"inputs_embeds": embed(ids)}
    lengths = [packed.past + len(text) for text in texts]
    ended: set[int] = set()
    while True:
        check()
        keep = max(map(len, live))
        device = packed.owner.device
        logits = packed.step(inputs, torch.tensor(owner, device=device), torch.tensor(place, device=device), keep)
        slots = [question for row in live for question in _padded(row, keep, -1)]
        tokens, ties = choose(logits.flatten(0, 1), slots, [answer.ids for answer in found])
        said = tokens.tolist()
        for question, token, tied in zip(slots, said, ties, strict=True):
            if question < 0:
                continue
            answer = found[question]
            answer.steps, answer.seconds, answer.tied = answer.steps + 1, time.perf_counter() - began, tied
            if tied or token in ends:
                ended.add(question)
                continue
            answer.ids.append(token)
            if len(answer.ids) == limits[question]:
                ended.add(question)
        yield found
        live = [[question for question in row if question not in ended] for row in live]
        if not any(live):
            return
        stay = packed.tidy(live, [sum(len(texts[q]) + len(found[q].ids) - 1 for q in row) for row in live])
        live = live if stay is None else [live[row] for row in stay]
        keep = max(map(len, live))
        latest = {question: token for question, token in zip(slots, said, strict=True) if question >= 0}
        ids = [_padded([latest[question] for question in row], keep, 0) for row in live]
        owner = [_padded(row, keep, PADDING) for row in live]
        place = [_padded([lengths[q] + len(found[q].ids) - 1 for q in row], keep, 0) for row in live]
        inputs = {"input_ids": torch.tensor(ids, device=device)}


def _laid_out(
    rows: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], past: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ids, owners and positions of all questions' tokens, (G, S) each; the last token of each stands in the last columns.

    So the logits that are wanted are the last ones of every row, as they are at every later step.
    """
    ids, owner, place = [], [], []
    heads = max(sum(len(texts[question]) - 1 for question in row) for row in rows)
    lasts = max(map(len, rows))
    for row in rows:
        before = [(question, i) for question in row for i in range(len(texts[question]) - 1)]
        behind = [(question, len(texts[question]) - 1) for question in row]
        ids.append(_padded([texts[q][i] for q, i in before], heads, 0) + _padded([texts[q][-1] for q in row], lasts, 0))
        owner.append(_padded([q for q, _ in before], heads, PADDING) + _padded(row, lasts, PADDING))
        place.append(
            _padded([past + i for _, i in before], heads, 0) + _padded([past + i for _, i in behind], lasts, 0)
        )
    return ids, owner, place


def _padded(row: Sequence[int], width: int, filler: int) -> list[int]:
    return [*row, *[filler] * (width - len(row))]
