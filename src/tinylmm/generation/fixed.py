"""Answers computed in fixed shapes: the same bits beside any other questions, and on a GPU nothing but recorded steps.

Two things let a question's answer depend on its batch in bf16: kernels are chosen by the number of rows, and sums are split by
the number of columns. Here neither number depends on the batch. How a prompt is computed follows from the prompt, the model and
`tokens` alone:

- An image goes through the tower alone, and what stands in front of a question (all up to the last image token) goes through
  the LLM alone, as it would for any other question about that image.
- What follows is read in chunks of `CHUNK` tokens, and answered a token at a time, by rows of one `Shape`: always as many rows,
  those without a question being idle. The shape follows from the lengths of prefix, question and answer (`fixed_plan.py`).
- Rows stand in groups of `GROUP` behind one copy of their prefix, whether a group is full or not.

Kernels at a fixed shape treat all their rows alike, or so one hopes: `_examine` puts the same prompt into every row of a new
shape, and compares them bit by bit. It also compares the logits with those of the plain model, so that a class of model whose
attention is something else is answered as before, not wrongly. Both take a few steps, once a shape.

A step's launch costs the host more than the step costs a GPU, so steps are recorded (`fixed_step.py`); nor does the host wait
for a step before it asks for the next: it looks at who goes on one step late.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tinylmm.generation.cache import CacheKind, cache_kind
from tinylmm.generation.decode import Continued, next_logits
from tinylmm.generation.fixed_cache import Shape
from tinylmm.generation.fixed_plan import Batch, Granules, Planner, Unit
from tinylmm.generation.fixed_step import Rows, Task, fixed_attention
from tinylmm.generation.prompts import Prompt

log = logging.getLogger(__name__)

KEPT = 2
"""Shapes whose rooms and recordings are kept."""
AGREES = {torch.float64: 1e-6, torch.float32: 1e-3}
AGREES_NARROW = 0.2
"""Largest difference to the plain model's logits, as a share of the largest logit, that rounding explains; by type, and for
narrow ones, which only gross errors exceed by far."""


class FixedDecoder:
    """Answers batches of one model in fixed shapes.

    Args:
        ends: token ids that end an answer.
        tokens: most tokens that the cache of a shape has places for.
        record: whether steps are recorded; by default where there is a GPU to do so.

    Attributes:
        refused: why the model cannot be computed so; None as long as nothing speaks against it.
        alike: whether all rows of all shapes so far gave the same bits for the same prompt.
        unrecorded: why steps are not replayed from recordings; None where all are.
        seconds: spent on examining and recording.
    """

    def __init__(
        self,
        llm: nn.Module,
        kind: CacheKind,
        ends: frozenset[int],
        tokens: int,
        granules: Granules | None = None,
        record: bool | None = None,
    ) -> None:
        self.llm, self.ends = llm, sorted(ends)
        self.planner = Planner(kind, tokens, granules or Granules())
        parameter = next(llm.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.refused = None if kind.shareable else kind.why
        self._record = self.device.type == "cuda" if record is None else record
        self.alike, self.seconds = True, 0.0
        self.unrecorded: str | None = None
        self._rows: OrderedDict[Shape, Rows] = OrderedDict()
        self._prefix: tuple[tuple[object, ...], DynamicCache] | None = None

    def plan(
        self, prompts: Sequence[Prompt], limit: Callable[[Prompt], int], rows: int, share: bool = True
    ) -> tuple[list[Batch], list[Prompt]]:
        """See `Planner.plan`; all prompts need another way where the model cannot be computed so."""
        return ([], list(prompts)) if self.refused else self.planner.plan(prompts, limit, rows, share)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        limits: Sequence[int],
        embed: Callable[[Prompt, tuple[int, ...]], Tensor],
        check: Callable[[], None] = lambda: None,
    ) -> list[Continued] | None:
        """Answer a batch's prompts; None where `refused` has come to say why not.

        Args:
            limits: most new tokens of each.
            embed: (prompt, its first ids) -> (1, L, Dl).
            check: called before every step; raises to stop.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        rows = self._prepared(batch, limits[0], embed)
        if rows is None:
            return None
        began = time.perf_counter()
        tasks, lines = self._seated(batch, limits)
        self._load(rows, batch, embed)
        with fixed_attention(self.llm):
            done = _run(rows, tasks, check)
        answers = self._read(rows, [(line, task) for line in lines if (task := tasks[line]) is not None])
        for line, found in zip(lines, answers, strict=True):
            found.seconds = done[line] - began
        return answers

    def steps(self) -> dict[Shape, dict[str, Callable[[], None]]]:
        """The steps of the shapes that are kept, by name, to be timed: no answer may be under way."""
        return {shape: rows.steps() for shape, rows in self._rows.items()}

    def forget(self) -> None:
        """Let go of the prefix that was computed last."""
        self._prefix = None

    def _seated(self, batch: Batch, limits: Sequence[int]) -> tuple[list[Task | None], list[int]]:
        """The task of each row, and the rows of the batch's prompts in order."""
        shape, lines = batch.shape, []
        tasks: list[Task | None] = []
        given = iter(limits)
        for unit in batch.units:
            past = len(unit.prefix)
            for prompt in unit.prompts:
                lines.append(len(tasks))
                tasks.append(Task(past - shape.shared, prompt.ids[past:], next(given)))
            tasks += [None] * (-len(tasks) % shape.rows)
        return [*tasks, *[None] * (shape.all_rows - len(tasks))], lines

    def _load(self, rows: Rows, batch: Batch, embed: Callable[[Prompt, tuple[int, ...]], Tensor]) -> None:
        """Compute the units' prefixes, each once if its units stand side by side, and put them in front of their rows."""
        place = 0
        while place < len(batch.units):
            first = batch.units[place]
            end = place + 1
            while end < len(batch.units) and _name(batch.units[end]) == _name(first):
                end += 1
            if first.prefix:
                rows.cache.load(slice(place, end), self._prefix_of(first, embed))
            place = end

    def _prefix_of(self, unit: Unit, embed: Callable[[Prompt, tuple[int, ...]], Tensor]) -> DynamicCache:
        if self._prefix is None or self._prefix[0] != _name(unit):
            self._prefix = None  # before the next one needs room
            self._prefix = _name(unit), prefill_whole(self.llm, embed(unit.prompts[0], unit.prefix))
        return self._prefix[1]

    def _read(self, rows: Rows, seats: Sequence[tuple[int, Task]]) -> list[Continued]:
        """What rows have said, once they have ended."""
        columns, said, tied = rows.columns.tolist(), rows.said.tolist(), rows.tied.tolist()
        if bool(rows.broken):
            raise FloatingPointError(
                "the model gives logits that are not finite: its weights are damaged, or overflow in this precision"
            )
        answers = []
        for line, task in seats:
            ids = said[line][task.left + len(task.ids) : columns[line] + 1]
            answers.append(Continued(ids[:-1] if ids[-1] in self.ends else ids, len(ids), 0.0, tied[line]))
        return answers

    # ------------------------------------------------------------------------------------------------ a new shape

    def _prepared(self, batch: Batch, limit: int, embed: Callable[[Prompt, tuple[int, ...]], Tensor]) -> Rows | None:
        """The rows of a shape, examined and recorded when they are new."""
        if self.refused is not None:
            return None
        if batch.shape in self._rows:
            self._rows.move_to_end(batch.shape)
            return self._rows[batch.shape]
        began = time.perf_counter()
        while len(self._rows) >= KEPT:
            self._rows.popitem(last=False)
        rows = Rows(self.llm, batch.shape, self.ends)
        try:
            self.refused = self._examine(rows, batch.units[0], limit, embed)
        except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            # Classes of models that do something else with their cache, of which there is no list.
            self.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.refused is not None:
            log.warning("%s is not decoded in fixed shapes: %s", type(self.llm).__name__, self.refused)
            return None
        why: str | None = "nobody asked for it"
        if self._record:
            with fixed_attention(self.llm):
                why = rows.record()
            if why is not None:
                log.warning("decoding is not recorded as a CUDA graph, and slower for it: %s", why)
        self.unrecorded = self.unrecorded or why
        self._rows[batch.shape] = rows
        self.seconds += time.perf_counter() - began
        log.debug("%s: examined in %.2f s", batch.shape, time.perf_counter() - began)
        return rows

    def _examine(
        self, rows: Rows, unit: Unit, limit: int, embed: Callable[[Prompt, tuple[int, ...]], Tensor]
    ) -> str | None:
        """Put one prompt into all rows: do they agree with each other, and with the plain model? Returns why not."""
        prompt, past, shape = unit.prompts[0], len(unit.prefix), rows.shape
        if unit.prefix:
            rows.cache.load(slice(0, shape.groups), self._prefix_of(unit, embed))
        task = Task(past - shape.shared, prompt.ids[past:], limit)
        with fixed_attention(self.llm):
            for _ in rows.begin([task] * shape.all_rows):
                pass
        found = rows.logits.clone()
        whole = embed(prompt, prompt.ids)
        positions = torch.arange(whole.shape[1], device=self.device)[None]
        expected = next_logits(
            self.llm, {"inputs_embeds": whole}, None, positions, DynamicCache(config=self.llm.config)
        )
        if bool(torch.isfinite(expected).all()):
            largest = expected.float().abs().max()
            apart = float((found[:1].float() - expected.float()).abs().max() / largest)
            if not apart <= AGREES.get(self.dtype, AGREES_NARROW):
                return f"its logits differ from the plain model's by {apart:.2g} of the largest"
        with fixed_attention(self.llm):
            rows.say()
        same = all(bool((row == row[:1]).all()) for row in (found, rows.logits))
        if not same and self.dtype not in AGREES:
            log.warning("rows of %s differ in their last bits: answers may depend on where a question stands", shape)
        self.alike &= same
        return None


def fixed_on_gpu(llm: nn.Module, ends: frozenset[int], tokens: int) -> FixedDecoder | None:
    """A decoder where the LLM is on a GPU; None on a CPU, where idle rows cost as much as others."""
    return FixedDecoder(llm, cache_kind(llm), ends, tokens) if next(llm.parameters()).is_cuda else None


def prefill_whole(llm: nn.Module, embeddings: Tensor) -> DynamicCache:
    """The cache of one prefix (1, P, Dl), all of it in layers with a sliding window too."""
    cache = DynamicCache(config=llm.config)
    cache.layers = [DynamicLayer() for _ in cache.layers]
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    next_logits(llm, {"inputs_embeds": embeddings}, None, positions, cache)
    return cache


def _name(unit: Unit) -> tuple[object, ...]:
    return unit.prefix, unit.images


def _run(rows: Rows, tasks: Sequence[Task | None], check: Callable[[], None]) -> list[float]:
    """Run steps until all rows have ended; returns when each had, as the host saw it: one step late."""
    done = [0.0] * len(tasks)
    going = {line for line, task in enumerate(tasks) if task is not None}
    for _ in rows.begin(tasks):
        check()
    watch = _Watch(rows.live)
    most = max(task.limit for task in tasks if task is not None)
    for _ in range(most):
        watch.note()
        if most > 1:
            rows.say()
        live, now = watch.read(), time.perf_counter()
        for line in [line for line in going if not live[line]]:
            done[line] = now
            going.discard(line)
        if not going:
            break
        check()
    return done


class _Watch:
    """Brings a small tensor to the host without making it wait for steps that were asked for since."""

    def __init__(self, watched: Tensor) -> None:
        self._watched = watched
        self._on_gpu = watched.is_cuda
        self._copy = torch.empty(watched.shape, dtype=watched.dtype, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def note(self) -> None:
        """Copy the tensor as it is behind all steps asked for so far."""
        self._copy.copy_(self._watched, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[bool]:
        """What was noted, as soon as it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[bool] = self._copy.tolist()
        return found
