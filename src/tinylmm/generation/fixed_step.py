"""A decoding step whose shapes never change, so that a GPU can record it once and replay it (a CUDA graph).

All that changes from step to step stands in tensors: what each row has, what it is given, whether it goes on, what it has said.
A step writes its results there and returns nothing, and the host need not wait for it. Shapes: see `fixed_cache.py`; V is the
vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylmm.generation.choose import TIE
from tinylmm.generation.decode import last_logits
from tinylmm.generation.fixed_cache import IN_FIXED_ROOMS, FixedCache, Layout, Shape

log = logging.getLogger(__name__)

CHUNK = 32
"""Tokens of each row that are read at once in front of its answer."""
TRIED = 2
"""Runs of a step before it is recorded: libraries choose kernels and make workspaces in the first ones."""


@contextmanager
def fixed_attention(llm: nn.Module) -> Iterator[None]:
    """Let the LLM attend to a `FixedCache` for as long as this lasts."""
    model = cast(PreTrainedModel, llm)
    before = model.config._attn_implementation
    model.set_attn_implementation(IN_FIXED_ROOMS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Task:
    """What one row has to do.

    Attributes:
        left: tokens of its prefix that stand in its own columns.
        ids: what it reads behind the prefix, one token at least.
        limit: most new tokens.
    """

    left: int
    ids: Sequence[int]
    limit: int


class Rows:
    """The rows of one shape, and the two steps: `read` a chunk of each row's prompt, `say` one token of each answer.

    Args:
        ends: token ids that end an answer.

    Attributes:
        live: (B,) bool, rows that go on.
        tied: (B,) bool, rows that met a near-tie; they have ended.
        broken: () bool, whether logits were not finite.
        said: (B, C) int64, chosen tokens at the own columns where they stand.
        columns: (B,) int64, own columns that are taken.
        logits: (B, V) of the last step.
    """

    def __init__(self, llm: nn.Module, shape: Shape, ends: Sequence[int]) -> None:
        parameter = next(llm.parameters())
        device, count = parameter.device, shape.all_rows
        self.llm, self.shape, self.device = llm, shape, device
        self.layout = Layout(shape, device, parameter.dtype)
        self.cache = FixedCache(llm, self.layout)
        self._share = TIE.get(parameter.dtype)
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self.columns, self.tokens, self._stops, self._counts = torch.zeros(4, count, dtype=torch.long, device=device)
        self.live, self.tied = torch.zeros(2, count, dtype=torch.bool, device=device)
        self.broken, self._answering = torch.zeros(2, dtype=torch.bool, device=device)
        self.said = torch.zeros(count, shape.own, dtype=torch.long, device=device)
        self._chunk = torch.zeros(count, CHUNK, dtype=torch.long, device=device)
        self.logits = torch.empty(0)
        self._steps = {name: _Step(work, device) for name, work in (("read", self._read), ("say", self._say))}

    def begin(self, tasks: Sequence[Task | None]) -> Iterator[None]:
        """Give each row its task (None: it idles), and let all read, a chunk at a time; then each has chosen a token."""
        given = [Task(0, (), 0) if task is None else task for task in tasks]
        starts = [task.left + len(task.ids) for task in given]
        self.columns.copy_(self._tensor([task.left for task in given]))
        self._stops.copy_(self._tensor([start + task.limit for start, task in zip(starts, given, strict=True)]))
        self.live.copy_(self._tensor([bool(task.ids) for task in given]).bool())
        self.tied.zero_()
        self.broken.zero_()
        chunks = [_chunks(task.ids) for task in given]
        most = max(map(len, chunks))
        for number in range(most):
            # All rows come to their end together, so that all have their first token behind the last chunk.
            now = [row[number - most + len(row)] if number >= most - len(row) else [] for row in chunks]
            self._chunk.copy_(self._tensor([[0] * (CHUNK - len(part)) + list(part) for part in now]))
            self._counts.copy_(self._tensor([len(part) for part in now]))
            self._answering.fill_(number == most - 1)
            self._steps["read"]()
            yield

    def say(self) -> None:
        """Choose the next token of each row that goes on."""
        self._steps["say"]()

    def record(self) -> str | None:
        """Have a GPU record both steps; returns why it could not, in which case one or both are launched kernel by kernel."""
        for name, step in self._steps.items():
            self.rest()
            why = step.record()
            if why is not None:
                return f"step '{name}': {why}"
        return None

    def rest(self) -> None:
        """Let all rows idle, so that steps may be run which nobody asked for."""
        for state in (self.columns, self._counts, self.live):
            state.zero_()

    def steps(self) -> dict[str, Callable[[], None]]:
        """Both steps by name, of rows that idle."""
        self.rest()
        return dict(self._steps)

    def _read(self) -> None:
        self._forward(self._chunk, self._counts)
        self._choose(self.live & self._answering)

    def _say(self) -> None:
        self._forward(self.tokens[:, None], self.live.long())
        self._choose(self.live)

    def _forward(self, ids: Tensor, counts: Tensor) -> None:
        self.layout.place(self.columns, counts, ids.shape[1])
        positions = self.shape.shared + self.layout.seen
        # Four dimensions, so that transformers makes no mask of its own.
        mask = self.layout.own_bias(1, None)
        logits = last_logits(self.llm, {"input_ids": ids}, mask, positions, self.cache.cache, 1)[:, -1]
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.columns.add_(counts)

    def _choose(self, speaking: Tensor) -> None:
        """The first of the likeliest tokens, as `choose.Chooser` chooses where nothing is drawn."""
        scores = self.logits.float()
        tokens = scores.argmax(-1)
        best = scores.topk(2, dim=-1).values
        self.broken |= (speaking & ~torch.isfinite(best[:, 0])).any()
        ended = (tokens[:, None] == self._ends).any(1) | (self.columns + 1 >= self._stops)
        if self._share is not None:
            largest = scores.abs().clamp(max=1e4).amax(-1)  # a forbidden token's -inf is no scale
            tied = speaking & (best[:, 0] - best[:, 1] <= self._share * largest)
            self.tied |= tied
            ended |= tied
        place = self.columns.where(speaking, torch.full_like(self.columns, self.shape.own - 1))
        self.said.scatter_(1, place[:, None], tokens[:, None])
        self.tokens.copy_(tokens.where(speaking, self.tokens))
        self.live &= ~(speaking & ended)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    """Cut into pieces of CHUNK, the first of which may be shorter."""
    first = len(ids) % CHUNK
    return ([ids[:first]] if first else []) + [ids[at : at + CHUNK] for at in range(first, len(ids), CHUNK)]


class _Step:
    """Work of fixed shapes, launched kernel by kernel until it is recorded."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    @torch.no_grad()
    def record(self) -> str | None:
        """Record, once; returns why it could not."""
        if self._device.type != "cuda":
            return f"a {self._device.type.upper()} records nothing"
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(TRIED):
                    self._work()
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that reads images may allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._work()
        except RuntimeError as error:  # of CUDA, and of whatever a model does that cannot be recorded
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self._graph = graph
        return None
