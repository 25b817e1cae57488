"""Answers for many who ask at any time: rows join the running batch between two tokens and leave it when they are done.

A tick of `ContinuousEngine` lets go of rows nobody waits for, takes new ones in, computes what of their prompts is not kept
from before (`prefixes.py`), and then one token of every row. The promise is that of `engine.py`, and is kept in the same way:
a row is followed in the batch only while no choice is in doubt. A choice that is, is left to `decode_alone`, which says the
answer from its beginning up to there (what was told already is the same by the promise), and the row joins the batch again.
Models whose cache cannot be shared are answered by it altogether.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylmm.constants import IMAGE_TOKEN_ID, Extent
from tinylmm.generation.cache import cache_kind
from tinylmm.generation.choose import TIE, Chooser, Sampling, log_probs
from tinylmm.generation.decode import Continued, decode_alone
from tinylmm.generation.engine import MASKING
from tinylmm.generation.images import EncodedImages
from tinylmm.generation.prefixes import Prefixes, Symbol, common
from tinylmm.generation.questions import End, Question, Token
from tinylmm.generation.row_cache import RowCache
from tinylmm.models.lmm import LMM

log = logging.getLogger(__name__)

WORTH_WAITING = 16
"""A question waits a tick for another that goes on with the same image, or with so many of the same tokens."""
CATCH_UP = 4
"""Tokens that were told already and are computed again alone in one tick."""
PREFILL = 4096
"""Most prompt tokens, padding counted in, that are computed in one tick, so that other answers go on; one prompt always is."""


@dataclass
class Counts:
    """What an engine has done so far."""

    ticks: int = 0
    rows: int = 0
    """Rows summed over ticks."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    near_ties: int = 0
    put_back: int = 0
    """Answers that had to wait in their middle, as others grew."""


class ContinuousEngine:
    """Answers questions with one model; `tick` and `close` belong to one thread, `ask` to any.

    Args:
        ends: token ids that end an answer: `PromptMaker.ends`.
        rows: most questions answered at a time.
        tokens: most tokens (prompt and answer, padding counted in) of the running batch; one question always fits. Where
            answers grow beyond it, the youngest wait, and go on from where they were.
        kept: most tokens of earlier prompts and answers whose cache is kept.
        kept_images: images whose features are kept.

    Attributes:
        exact: whether an answer is promised to be the same tokens whoever else asks.
    """

    def __init__(
        self, model: LMM, ends: frozenset[int], rows: int, tokens: int, kept: int, kept_images: int = 32
    ) -> None:
        self.model, self.ends, self.rows, self.tokens = model, ends, rows, tokens
        parameter = next(model.llm.parameters())
        self.device = parameter.device
        self.kind = cache_kind(model.llm)
        self.exact = parameter.dtype in TIE
        self.counts = Counts()
        self.images = EncodedImages(model, keep=kept_images)
        self.waiting: deque[Question] = deque()
        self.prefixes = Prefixes(kept)
        self._greedy = Chooser(Sampling(), 0, self.device)
        self._running: list[Question] = []
        self._alone: list[Question] = []
        self._cache = RowCache(model.llm)
        self._turns = 0
        self._say_what_is_promised(parameter.dtype)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._running or self._alone)

    @property
    def answering(self) -> int:
        """Questions whose turn it is."""
        return len(self._running) + len(self._alone)

    def ask(self, question: Question) -> None:
        """Put a question behind those that wait."""
        question.symbols = self._symbols(question)
        self.waiting.append(question)

    def tick(self) -> None:
        """Go one token further with every question."""
        self._forget_cancelled()
        self._put_back()
        taken = self._admit()
        if taken:
            self._guard(taken, lambda: self._prefill(taken))
        running = [question for question in self._running if question not in taken]
        if running:
            self._guard(self._running, self._step)
        for question in list(self._alone):
            self._guard([question], lambda: self._step_alone(question))  # noqa: B023 - called at once
        self.counts.ticks += 1
        self.counts.rows += self.answering

    def close(self, error: Exception) -> None:
        """Tell everybody who still waits that there will be no answer."""
        for question in [*self.waiting, *self._running, *self._alone]:
            question.emit(error)
        self.waiting.clear()
        self._reset()

    def _say_what_is_promised(self, dtype: torch.dtype) -> None:
        if not self.exact:
            name = str(dtype).removeprefix("torch.")
            log.warning(
                "%s: who asks beside others may get another answer where two tokens nearly tie, but not in fp32", name
            )
        if not self.kind.shareable:
            log.warning("questions are answered one by one: %s, which cannot be shared", self.kind.why)

    def _guard(self, questions: Sequence[Question], work: Callable[[], None]) -> None:
        """Whatever goes wrong in a computation ends the questions that took part in it, and no others."""
        try:
            work()
        except Exception as error:
            log.exception("an answer failed")
            failed = [question for question in questions if question in self._running or question in self._alone]
            batched = [question for question in self._running if question not in failed]
            self._alone = [question for question in self._alone if question not in failed]
            for question in failed:
                question.emit(error)
            if len(batched) < len(self._running):  # the cache may be half written: the others begin again
                self._running.clear()
                self._cache = RowCache(self.model.llm)
                for question in batched:
                    self._answer_alone(question)

    def _reset(self) -> None:
        self._running.clear()
        self._alone.clear()
        self._cache = RowCache(self.model.llm)

    def _forget_cancelled(self) -> None:
        self._alone = [question for question in self._alone if not question.cancelled]
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._remove(row, keep=True)  # it may have come to a stop of its client's, who goes on from there

    def _put_back(self) -> None:
        """Let the youngest rows wait where the next tokens would not fit."""
        while len(self._running) > 1:
            longest = max(len(question.known) for question in [*self._running, *self._alone])
            if self.answering * longest <= self.tokens:
                return
            row = max(range(len(self._running)), key=lambda row: self._running[row].turn)
            self.waiting.appendleft(self._running[row])
            self._remove(row, keep=True)
            self.counts.put_back += 1

    def _admit(self) -> list[Question]:
        """Take questions in as far as there is room, in their order; one that would compute what another of them is about to
        compute waits for it."""
        taken: list[Question] = []
        starts: list[tuple[int, tuple[Symbol, ...]]] = []
        put_off: list[Question] = []
        longest = max((question.room for question in [*self._running, *self._alone]), default=0)
        width = 0
        while self.waiting and self.answering + len(taken) < self.rows:
            question = self.waiting[0]
            if question.cancelled:
                self.waiting.popleft()
                continue
            if not self._batches(question):
                self._answer_alone(self.waiting.popleft())
                continue
            most = max(longest, question.room)
            rows = self.answering + len(taken) + 1
            if rows > 1 and rows * most > self.tokens:
                break
            start = self._start(question)
            rest = question.known[start:]
            if any(start == at and _worth_waiting(rest, others) for at, others in starts):
                put_off.append(self.waiting.popleft())
                continue
            if taken and (len(taken) + 1) * max(width, len(rest)) > PREFILL:
                break
            taken.append(self.waiting.popleft())
            starts.append((start, rest))
            longest, width = most, max(width, len(rest))
        self.waiting.extendleft(reversed(put_off))
        return taken

    def _batches(self, question: Question) -> bool:
        """Whether a question may be answered beside others."""
        kind, cost = self.kind, question.cost
        masks = getattr(self.model.llm.config, "_attn_implementation", "") in MASKING
        return masks and kind.shareable and kind.pads(cost) and (kind.long_from is None or cost <= kind.long_from)

    def _symbols(self, question: Question) -> tuple[Symbol, ...]:
        keys = iter([key for key, (begin, end) in self._spans(question) for _ in range(begin, end)])
        return tuple(next(keys) if token == IMAGE_TOKEN_ID else token for token in question.prompt.ids)

    def _spans(self, question: Question) -> list[tuple[str, tuple[int, int]]]:
        """Where each image's tokens begin and end."""
        found, place, ids = [], 0, question.prompt.ids
        for key in question.prompt.images:
            begin = ids.index(IMAGE_TOKEN_ID, place)
            place = begin + self.model.tokens_of(*question.sizes[key])
            found.append((key, (begin, place)))
        return found

    def _start(self, question: Question) -> int:
        """Where to go on behind what is kept of a prompt: before its last token, and not in the middle of an image."""
        matched, _ = self.prefixes.match(question.known[:-1])
        inside = (begin for _, (begin, end) in self._spans(question) if begin < matched < end)
        return next(inside, matched)

    def _prefill(self, taken: list[Question]) -> None:
        first = len(self._running)
        self._running += taken
        rests, keys = [], []
        loads: dict[str, Callable[[str], Tensor]] = {}
        for question in taken:
            start = self._start(question)
            _, segments = self.prefixes.match(question.known[:start])
            self._cache.add(segments, question.room)
            if question.cached is None:
                self._first_turn(question, start)
            rests.append((*question.prompt.ids, *question.ids)[start:])
            wanted = [key for key, (begin, _) in self._spans(question) if begin >= start]
            loads |= dict.fromkeys(wanted, question.load)
            keys += wanted
        sizes = {key: size for question in taken for key, size in question.sizes.items()}
        embeddings = self._embed(rests, keys, loads, sizes)
        logits = self._cache.step({"inputs_embeds": embeddings}, [len(rest) for rest in rests], first)
        for row, question in enumerate(taken, first):
            self.prefixes.add(question.known, lambda begin, end: self._cache.segment(row, begin, end))  # noqa: B023
        self._choose(first, logits)

    def _first_turn(self, question: Question, cached: int) -> None:
        self._turns += 1
        question.turn, question.cached = self._turns, cached
        self.counts.prompt_tokens += len(question.symbols)
        self.counts.cached_tokens += cached
        sampling = question.sampling
        if sampling.temperature or sampling.repetition_penalty != 1:
            question.own = Chooser(sampling, 1, self.device)

    @torch.no_grad()
    def _embed(
        self,
        rests: Sequence[Sequence[int]],
        keys: Sequence[str],
        loads: dict[str, Callable[[str], Tensor]],
        sizes: dict[str, Extent],
    ) -> Tensor:
        """(B, S, Dl) of token ids, shorter rows padded on the left, with the features of images at their placeholders."""
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests], device=self.device)
        self.images.announce(keys)
        try:
            self.images.encode(keys, lambda key: loads[key](key), lambda: None)
            extents = self.model.extents([sizes[key] for key in keys])
            return self.model.embed(ids, None, self.images.features(keys), **extents)[0]
        finally:
            self.images.release(keys)

    def _step(self) -> None:
        last = torch.tensor([[question.ids[-1]] for question in self._running], device=self.device)
        self._choose(0, self._cache.step({"input_ids": last}, [1] * len(self._running)))

    def _choose(self, first: int, logits: Tensor) -> None:
        """Give the rows from `first` on their next token; those that end, or are in doubt, leave."""
        questions = self._running[first:]
        fine = torch.isfinite(logits.amax(dim=-1)).tolist()
        shared = [line for line, question in enumerate(questions) if question.own is None and fine[line]]
        chosen: dict[int, tuple[int, bool]] = {}
        if shared:
            tokens, doubts = self._greedy(logits[shared], shared, [])
            chosen = dict(zip(shared, zip(tokens.tolist(), doubts, strict=True), strict=True))
        for line in reversed(range(len(questions))):  # from behind, as the last row takes the place of one that leaves
            question, row = questions[line], first + line
            if not fine[line]:
                self._remove(row)
                question.emit(FloatingPointError("the model gives logits that are not finite"))
                continue
            if question.own is not None:
                token, (doubt,) = question.own(logits[line : line + 1], [0], [question.ids])
                chosen[line] = int(token), doubt
            token_id, tied = chosen[line]
            if tied:
                self.counts.near_ties += 1
                self._remove(row, keep=True)
                self._answer_alone(question)
            elif self._say(question, token_id, logits[line]):
                self._remove(row, keep=True)

    def _say(self, question: Question, token: int, logits: Tensor) -> bool:
        """Tell a token, and whether it was the last."""
        if token in self.ends:
            question.emit(End("stop"))
            return True
        known = None if question.alternatives is None else log_probs(logits, token, question.alternatives)
        question.ids.append(token)
        self.counts.new_tokens += 1
        question.emit(Token(token, known))
        if len(question.ids) == question.limit:
            question.emit(End("length"))
            return True
        return False

    def _remove(self, row: int, keep: bool = False) -> None:
        """Take a row out; `keep` what it said for the next turn."""
        question = self._running[row]
        if keep:
            known = question.known[: self._cache.lengths[row]]
            self.prefixes.add(known, lambda begin, end: self._cache.segment(row, begin, end))
        self._cache.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _answer_alone(self, question: Question) -> None:
        """Answer by what defines an answer, from the beginning or from where that was left."""
        self._alone.append(question)
        if question.cached is None:
            self._first_turn(question, 0)
        if question.alone is None:
            question.alone = self._steps_alone(question)

    def _steps_alone(self, question: Question) -> Iterator[Continued]:
        prompt = question.prompt
        embeddings = self._embed(
            [prompt.ids], prompt.images, dict.fromkeys(prompt.images, question.load), question.sizes
        )
        choose = Chooser(question.sampling, 1, self.device, doubts=False)
        said = 0

        def choose_and_say(
            logits: Tensor, rows: Sequence[int], ids: Sequence[Sequence[int]]
        ) -> tuple[Tensor, list[bool]]:
            nonlocal said
            tokens, doubts = choose(logits, rows, ids)
            said += 1
            if said > len(question.ids):  # else it was told already, and is the same by the promise
                self._say(question, int(tokens), logits[0])
            return tokens, doubts

        yield from decode_alone(self.model.llm, embeddings, choose_and_say, self.ends, question.limit)

    def _step_alone(self, question: Question) -> None:
        """Go on with a question; once its doubt is settled it joins the others again, and this goes on at its next doubt."""
        told = len(question.ids)
        for _ in range(CATCH_UP):
            if question.alone is None or next(question.alone, None) is None:
                self._alone.remove(question)
                return
            if len(question.ids) > told:
                break
        if len(question.ids) > told and len(question.ids) < question.limit and self._batches(question):
            self._alone.remove(question)
            self.waiting.appendleft(question)


def _worth_waiting(rest: Sequence[Symbol], others: Sequence[Symbol]) -> bool:
    shared = common(rest, others)
    return shared >= WORTH_WAITING or any(isinstance(symbol, str) for symbol in rest[:shared])
