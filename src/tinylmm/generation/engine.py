"""Answers to many prompts: each image is encoded once, what its prompts share is computed once, batches are bounded.

Evaluation, chat, streams and lmms-eval all ask here. Prompts about the same images share everything up to the last image
token, and the words behind it that all prompts have in common. `Engine.replies` walks over windows of such groups: their
prefixes are computed together and kept for as long as the window lasts, then all that follows them is answered in batches,
each of at most `rows` prompts and about `tokens` tokens; prompts that share a prefix lie side by side behind it (`packed.py`).
A row is followed in its batch only while no choice is in doubt (`choose.py`); otherwise it is answered again by `decode_alone`,
whose answer is the definition. Then every answer is that of `decode_alone`, in whatever batch it was asked.

A GPU is kept waiting by that: with a `FixedDecoder` (`fixed.py`) batches are answered in fixed shapes, in which narrow types
keep the promise too, and what does not fit in there is answered as above.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tinylmm.constants import IMAGE_TOKEN_ID, Extent
from tinylmm.errors import StoppedError
from tinylmm.generation.cache import CacheKind, cache_kind, join_rows, new_cache, prefill, select_rows
from tinylmm.generation.choose import TIE, Chooser, Sampling
from tinylmm.generation.decode import Continued, Start, decode, decode_alone, last
from tinylmm.generation.fixed import FixedDecoder
from tinylmm.generation.fixed_plan import Batch
from tinylmm.generation.groups import Group, groups_of, images_of
from tinylmm.generation.images import EncodedImages, ReadAhead
from tinylmm.generation.invariant import IN_DOUBLE, invariant_rows
from tinylmm.generation.packed import PackedRows, decode_packed
from tinylmm.generation.prompts import Prompt
from tinylmm.models.lmm import LMM
from tinylmm.stop import stop_requested

log = logging.getLogger(__name__)

OWN_COLUMNS = 256
"""Prompts of one row may bring so many columns of their own, or as many as what they share has."""
SPARE = 16
"""New tokens of each prompt that a row has room for at once; few answers about an image with many questions are longer."""
MASKING = ("sdpa", "eager", IN_DOUBLE)
"""Attention implementations that take a mask with padding in the middle of a row."""


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        ids: new token ids, without the end token.
        new_tokens: tokens computed, the end token counted in.
        seconds: from the start of the prompt's batch until it was answered.
        rows: how many prompts were in the batch.
        alone: whether the answer was settled by decoding alone (a near-tie, or a model whose cache cannot be shared).
    """

    item_id: str
    ids: list[int]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    rows: int
    alone: bool


@dataclass(frozen=True)
class _Row:
    """Prompts that lie side by side behind the prefix of the group at `place` in its window."""

    place: int
    prompts: list[Prompt]

    def columns(self, past: int, limit: Callable[[Prompt], int]) -> int:
        """What the row takes of a cache, `limit` new tokens of each prompt with it."""
        return past + sum(len(prompt.ids) - past + limit(prompt) for prompt in self.prompts)


class Engine:
    """Answers prompts with one model.

    Args:
        load: image key -> (3, H, W), normalised for the tower; of tiles, or frames of a clip, (T, 3, H, W).
        ends: token ids that end an answer: `PromptMaker.ends`.
        sampling: how tokens are chosen, and how many at most.
        rows: most prompts in a batch.
        tokens: most tokens (prompt and answer) in a batch, and most prefix tokens kept at a time; one prompt always fits.
        share: whether prompts may share the computation of what they begin with.
        sizes: image key -> width and height in pixels; needed where the model takes images in tiles, and of clips.
        images: where features are kept; shared by engines that ask about the same images.
        invariant: compute each row as if it were alone (`invariant.py`): slower, and the promise holds in bf16 and fp16 too.
        fixed: answers what it can, where the likeliest token is chosen; shared by engines with the same model and ends.
        readers: threads that read images ahead; `load` is called from all of them.

    Attributes:
        exact: whether an answer is promised to be the same tokens in any batch, with and without shared prefixes.
        near_ties: answers that were in doubt in their batch and settled alone.
    """

    def __init__(
        self,
        model: LMM,
        load: Callable[[str], Tensor],
        ends: frozenset[int],
        sampling: Sampling,
        rows: int = 64,
        tokens: int = 32768,
        share: bool = True,
        sizes: Mapping[str, Extent] | None = None,
        images: EncodedImages | None = None,
        invariant: bool = False,
        fixed: FixedDecoder | None = None,
        readers: int = 1,
    ) -> None:
        self.model, self.load, self.ends, self.sizes = model, load, ends, sizes
        self.sampling, self.rows, self.tokens, self.share = sampling, rows, tokens, share
        parameter = next(model.llm.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kind: CacheKind = cache_kind(model.llm)
        self.invariant = invariant
        self.exact = self.dtype in TIE or invariant
        self.near_ties = 0
        self._images, self._readers = images or EncodedImages(model), readers
        self._fixed = fixed if not invariant and sampling.is_plain else None
        if invariant or self._fixed is not None:
            self._images.at_once = 1

    @property
    def images_encoded(self) -> int:
        """Images that went through the tower."""
        return self._images.encoded

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[list[Reply]]:
        """Answer the prompts, a list of replies at a time as batches are done, in an order of the engine's own.

        Raises:
            StoppedError: a stop was asked for; replies given so far count, the batch at hand does not.
            FloatingPointError: the model's logits are not finite.
        """
        batches: list[Batch] = []
        rest = list(prompts)
        if self._fixed is not None:
            batches, rest = self._fixed.plan(prompts, self._limit, self.rows, self.share)
        if self._fixed is not None and not rest:
            self.exact = True
        elif len(rest) > 1:
            self._say_what_is_promised(max(map(self._cost, rest)))
        work: list[tuple[Batch | list[Group], list[str]]] = [(batch, batch.images) for batch in batches]
        windows, together = self._windows_of(rest)
        work += [(window, [key for group in window for key in group.images]) for window in windows]
        uses = Counter(key for _, keys in work for key in keys)
        self._images.announce(uses.elements())
        try:
            missing = self._images.missing(key for _, keys in work for key in keys)
            ahead = ReadAhead(self.load, missing, self._readers)
            with self._rows_apart(), ahead as load:
                for some, keys in work:
                    self._images.encode(keys, load, _check_stop)
                    yield from self._fixed_replies(some) if isinstance(some, Batch) else self._replies(some, together)
                    self._images.release(keys)
                    uses.subtract(keys)
        finally:  # also where the caller leaves, or an answer fails
            self._images.release((+uses).elements())
            if self._fixed is not None:
                self._fixed.forget()

    def _windows_of(self, prompts: Sequence[Prompt]) -> tuple[list[list[Group]], bool]:
        """Windows of prompts, and whether prompts may share a computation."""
        longest = max(map(self._cost, prompts), default=0)
        together = self.kind.shareable and (self.kind.long_from is None or longest <= self.kind.long_from)
        return list(self._windows(groups_of(prompts, self.share and together))), together

    def _fixed_replies(self, batch: Batch) -> Iterator[list[Reply]]:
        assert self._fixed is not None, "it made the batch"
        prompts = batch.prompts
        found = self._fixed.answer(batch, [self._limit(prompt) for prompt in prompts], self._embed_part, _check_stop)
        self.exact &= self._fixed.alike or self.dtype in TIE
        if found is not None:
            yield [self._settled(prompt, answer, len(prompts)) for prompt, answer in zip(prompts, found, strict=True)]
            return
        if self.dtype not in TIE and self.exact:
            self.exact = False
            self._say_what_is_promised(max(map(self._cost, prompts)))
        windows, together = self._windows_of(prompts)
        for window in windows:
            yield from self._replies(window, together)

    def _replies(self, window: list[Group], together: bool) -> Iterator[list[Reply]]:
        if together:
            yield from self._answer_window(window)
            return
        for prompt in (prompt for group in window for prompt in group.prompts):
            yield [self._reply(prompt, last(self._alone(prompt)), 1, alone=True)]

    def stream(self, prompt: Prompt) -> Iterator[int]:
        """Yield the ids of one answer as they are chosen; they are those of its reply.

        The prompt's images are encoded before this returns, so that their faults come before the first id.
        """
        self._images.announce(prompt.images)
        with self._rows_apart():
            self._images.encode(prompt.images, self.load, _check_stop)
            steps = self._alone(prompt)
        self._images.release(prompt.images)
        return self._new_ids(steps)

    def _new_ids(self, steps: Iterator[Continued]) -> Iterator[int]:
        sent = 0
        with self._rows_apart():
            for answer in steps:
                yield from answer.ids[sent:]
                sent = len(answer.ids)

    def _rows_apart(self) -> AbstractContextManager[None]:
        return invariant_rows(self.model) if self.invariant else nullcontext()

    def _say_what_is_promised(self, longest: int) -> None:
        if not self.exact:
            log.warning(
                "%s: answers may differ by a near-tie between batch sizes; precision fp32 promises that they do not",
                str(self.dtype).removeprefix("torch."),
            )
        if not self.kind.shareable:
            log.warning("prompts are answered one by one: %s, which cannot be shared", self.kind.why)
        elif self.kind.long_from is not None and longest > self.kind.long_from:
            log.warning(
                "prompts are answered one by one: with answers they reach %d tokens, and beyond %d this model's rotary "
                "embedding changes with the length",
                longest,
                self.kind.long_from,
            )
            if self.kind.remembers:
                self.exact = False
                log.warning("and it depends on what was asked before: answers may change with the order of questions")
        limit = getattr(self.model.llm.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            log.warning("prompts with answers reach %d tokens, the model was made for %d", longest, limit)

    def _windows(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Groups of equal prefix length, as many as may be kept at a time."""
        for _, same in groupby(groups, key=lambda group: len(group.prefix)):
            window: list[Group] = []
            held = 0
            for group in same:
                cost = max(len(group.prefix), group.prompts[0].ids.count(IMAGE_TOKEN_ID), 1)
                if window and held + cost > self.tokens:
                    yield window
                    window, held = [], 0
                window.append(group)
                held += cost
            yield window

    def _answer_window(self, window: list[Group]) -> Iterator[list[Reply]]:
        past = len(window[0].prefix)
        prefixes = self._prefixes(window) if past else None
        longest = max(self._cost(prompt) for group in window for prompt in group.prompts)
        if prefixes is not None and self._can_pad(longest):
            yield from self._answer_packed(window, prefixes)
            return
        rows = [(place, prompt) for place, group in enumerate(window) for prompt in group.prompts]
        rows.sort(key=lambda row: -len(row[1].ids))
        for batch in self._batches([prompt for _, prompt in rows]):
            places, rows = [place for place, _ in rows[: len(batch)]], rows[len(batch) :]
            cache = (
                new_cache(self.model.llm)
                if prefixes is None
                else select_rows(prefixes, torch.tensor(places, device=self.device))
            )
            lengths = [len(prompt.ids) - past for prompt in batch]
            embeddings = self._embed([prompt.ids[past:] for prompt in batch], [] if past else images_of(batch))
            limits = [self._limit(prompt) for prompt in batch]
            choose = Chooser(self.sampling, len(batch), self.device)
            start = Start(cache, past, embeddings, lengths)
            found = last(decode(self.model.llm, start, choose, self.ends, limits, _check_stop))
            yield [self._settled(prompt, answer, len(batch)) for prompt, answer in zip(batch, found, strict=True)]

    def _answer_packed(self, window: list[Group], prefixes: DynamicCache) -> Iterator[list[Reply]]:
        """Answer the prompts of a window's groups, those about the same images side by side behind what they share."""
        past, llm = len(window[0].prefix), self.model.llm
        for batch in self._row_batches(window):
            prompts = [prompt for row in batch for prompt in row.prompts]
            limits = [self._limit(prompt) for prompt in prompts]
            places = torch.tensor([row.place for row in batch], device=self.device)
            spare = max(row.columns(past, lambda prompt: min(self._limit(prompt), SPARE)) for row in batch) - past
            packed = PackedRows(llm, select_rows(prefixes, places, spare), past, len(batch))
            texts = [[prompt.ids[past:] for prompt in row.prompts] for row in batch]
            choose = Chooser(self.sampling, len(prompts), self.device)
            found = last(decode_packed(packed, texts, self._embed, choose, self.ends, limits, _check_stop))
            yield [self._settled(prompt, answer, len(prompts)) for prompt, answer in zip(prompts, found, strict=True)]

    def _row_batches(self, window: list[Group]) -> Iterator[list[_Row]]:
        """Cut groups into rows, widest first, and these into batches within both bounds."""
        past = len(window[0].prefix)
        rows = [_Row(place, part) for place, group in enumerate(window) for part in self._parts(group.prompts, past)]
        rows.sort(key=lambda row: -row.columns(past, self._limit))
        batch: list[_Row] = []
        for row in rows:
            prompts = sum(len(other.prompts) for other in [*batch, row])
            widest = (batch or [row])[0].columns(past, self._limit)
            if batch and (prompts > self.rows or (len(batch) + 1) * widest > self.tokens):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _parts(self, prompts: list[Prompt], past: int) -> list[list[Prompt]]:
        """Cut the prompts about the same images into as few rows as may be, all about equally long.

        A row's questions see each other's columns only to pass over them: more of these than of the beginning are no gain.
        """
        prompts = sorted(prompts, key=lambda prompt: -len(prompt.ids))
        own, cost = len(prompts[0].ids) - past, self._cost(prompts[0]) - past
        most = min(self.rows, max(past, OWN_COLUMNS) // own, (self.tokens - past) // cost)
        while most > 1 and not self.kind.pads(past + most * cost):
            most -= 1
        parts = -(-len(prompts) // max(1, most))
        return [prompts[number::parts] for number in range(parts)]

    def _settled(self, prompt: Prompt, answer: Continued, rows: int) -> Reply:
        """The row's own answer, or after a near-tie the reference's."""
        if not answer.tied:
            return self._reply(prompt, answer, rows, alone=False)
        self.near_ties += 1
        again = last(self._alone(prompt))
        again.seconds += answer.seconds
        return self._reply(prompt, again, rows, alone=True)

    def _batches(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        """Cut prompts, longest first, into batches within both bounds, of equal length: padding would change them."""
        batch: list[Prompt] = []
        largest = 0
        for prompt in prompts:
            if batch:
                full = len(batch) == self.rows or (len(batch) + 1) * max(largest, self._cost(prompt)) > self.tokens
                if full or len(prompt.ids) != len(batch[0].ids):
                    yield batch
                    batch, largest = [], 0
            batch.append(prompt)
            largest = max(largest, self._cost(prompt))
        if batch:
            yield batch

    def _cost(self, prompt: Prompt) -> int:
        return len(prompt.ids) + self._limit(prompt)

    def _limit(self, prompt: Prompt) -> int:
        most = self.sampling.max_new_tokens
        return most if prompt.limit is None else min(most, prompt.limit)

    def _can_pad(self, tokens: int) -> bool:
        return self.kind.pads(tokens) and getattr(self.model.llm.config, "_attn_implementation", "") in MASKING

    @torch.no_grad()
    def _prefixes(self, window: list[Group]) -> DynamicCache:
        """One cache with a row a group; computed in batches, then put together."""
        size = max(1, min(self.rows, self.tokens // len(window[0].prefix)))
        caches = []
        for first in range(0, len(window), size):
            _check_stop()
            chunk = window[first : first + size]
            images = [key for group in chunk for key in group.images]
            caches.append(prefill(self.model.llm, self._embed([group.prefix for group in chunk], images)))
        return caches[0] if len(caches) == 1 else join_rows(caches)

    @torch.no_grad()
    def _embed(self, rows: Sequence[Sequence[int]], images: Sequence[str] = ()) -> Tensor:
        """(B, S, Dl) of token ids, shorter rows padded on the left, with the features of `images` at the placeholders."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self.device)
        extents = self.model.extents([self.sizes[key] for key in images]) if self.sizes is not None else {}
        return self.model.embed(ids, None, self._images.features(images), **extents)[0]

    def _embed_part(self, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """(1, L, Dl) of a prompt's first ids, all its images among them."""
        return self._embed([ids], prompt.images)

    def _alone(self, prompt: Prompt) -> Iterator[Continued]:
        embeddings = self._embed([prompt.ids], prompt.images)
        choose = Chooser(self.sampling, 1, self.device, doubts=False)
        return decode_alone(self.model.llm, embeddings, choose, self.ends, self._limit(prompt), _check_stop)

    def _reply(self, prompt: Prompt, answer: Continued, rows: int, alone: bool) -> Reply:
        return Reply(prompt.item_id, answer.ids, len(prompt.ids), answer.steps, answer.seconds, rows, alone)


def _check_stop() -> None:
    if stop_requested():
        raise StoppedError("stopped while generating; the same command continues with the questions not answered yet")
