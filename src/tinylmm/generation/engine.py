"""Greedy answers to many prompts: each image is encoded once, what its prompts share is computed once, batches are bounded.

Prompts about the same images share everything up to the last image token, and the words behind it that all prompts have in
common. `Engine.replies` walks over windows of such groups: their prefixes are computed together and kept for as long as the
window lasts, then all that follows them is answered in batches sorted by length, each at most `rows` rows and about
`tokens` tokens. What a prompt is answered does not depend on its batch; see `decode.py` for why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from tinylmm.data.chat import IMAGE_SLOT, IMAGE_TOKEN_ID, ChatTemplate, Turn
from tinylmm.errors import StoppedError
from tinylmm.generation.decode import (
    TIE,
    CacheKind,
    Continued,
    cache_kind,
    decode_alone,
    decode_batch,
    join_rows,
    new_cache,
    prefill,
    select_rows,
)
from tinylmm.models.lmm import LMM
from tinylmm.stop import stop_requested

log = logging.getLogger(__name__)

ENCODE_IMAGES = 64
MASKING = ("sdpa", "eager")
"""Attention implementations that take a mask with padding in the middle of a row."""


@dataclass(frozen=True)
class Prompt:
    """What to ask: `ids` with Q placeholders an image, and as many `images` (keys) in their order."""

    item_id: str
    ids: tuple[int, ...]
    images: tuple[str, ...] = ()


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


@dataclass
class _Group:
    """Prompts that begin with the same tokens over the same images."""

    prefix: tuple[int, ...]
    images: tuple[str, ...]
    prompts: list[Prompt] = field(default_factory=list)


def make_prompt(
    item_id: str,
    text: str,
    images: Sequence[str],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int],
) -> Prompt:
    """Render a question with its images in front, one a line, as LLaVA's scripts do; `<image>` in the text is taken out.

    Args:
        images: keys, and
        image_tokens: how many placeholders each takes.
    """
    user = f"{IMAGE_SLOT}\n" * len(images) + text.replace(IMAGE_SLOT, "").strip()
    ids = template.render_prompt([Turn(user, None)], tokenizer)
    counts = iter(image_tokens)
    expanded = (token for i in ids for token in ([i] * next(counts) if i == IMAGE_TOKEN_ID else [i]))
    return Prompt(item_id, tuple(expanded), tuple(images))


def end_tokens(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of sequence and the one that the template trains."""
    ends = {tokenizer.eos_token_id}
    if template.eos is not None:
        ends.add(tokenizer.convert_tokens_to_ids(template.eos))
    return frozenset(int(token) for token in ends if token is not None)


class Engine:
    """Answers prompts with one model.

    Args:
        load: image key -> (3, H, W), normalised for the tower; where the model takes images in tiles, (T, 3, H, W).
        ends: token ids that end an answer.
        rows: most prompts in a batch.
        tokens: most tokens (prompt and answer) in a batch, and most prefix tokens kept at a time; one prompt always fits.
        share: whether prompts may share the computation of what they begin with.
        sizes: image key -> width and height in pixels; needed where the model takes images in tiles.
    """

    def __init__(
        self,
        model: LMM,
        load: Callable[[str], Tensor],
        ends: frozenset[int],
        max_new_tokens: int,
        rows: int = 64,
        tokens: int = 32768,
        share: bool = True,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.model, self.load, self.ends, self.sizes = model, load, ends, sizes
        self.max_new_tokens, self.rows, self.tokens, self.share = max_new_tokens, rows, tokens, share
        parameter = next(model.llm.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kind: CacheKind = cache_kind(model.llm)
        self.exact = self.dtype in TIE
        """Whether an answer is promised to be the same tokens in any batch, with and without shared prefixes."""
        self.near_ties = 0
        self.images_encoded = 0
        self._features: dict[str, Tensor] = {}
        self._uses: Counter[str] = Counter()

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[list[Reply]]:
        """Answer the prompts, a list of replies at a time as batches are done, in an order of the engine's own.

        Raises:
            StoppedError: a stop was asked for; replies given so far count, the batch at hand does not.
            FloatingPointError: the model's logits are not finite.
        """
        longest = max((len(prompt.ids) for prompt in prompts), default=0) + self.max_new_tokens
        self._say_what_is_promised(longest)
        together = self.kind.shareable and (self.kind.long_from is None or longest <= self.kind.long_from)
        groups = self._groups(prompts, self.share and together)
        self._uses = Counter(key for group in groups for key in group.images)
        for window in self._windows(groups):
            self._encode(window)
            if together:
                yield from self._answer_window(window)
            else:
                for prompt in (prompt for group in window for prompt in group.prompts):
                    yield [self._reply(prompt, self._alone(prompt), 1, alone=True)]
            self._forget(window)

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

    def _groups(self, prompts: Sequence[Prompt], share: bool) -> list[_Group]:
        """Groups of prompts with equal beginnings, longest first (what does not fit shows at once), else as given."""
        shared = _shared_lengths(prompts) if share else {}
        groups: dict[tuple[tuple[int, ...], tuple[str, ...]], _Group] = {}
        for prompt in prompts:
            prefix = prompt.ids[: shared.get(_behind_images(prompt), 0)]
            groups.setdefault((prefix, prompt.images), _Group(prefix, prompt.images)).prompts.append(prompt)
        longest = {key: max(len(prompt.ids) for prompt in group.prompts) for key, group in groups.items()}
        return [groups[key] for key in sorted(groups, key=lambda key: (-len(key[0]), -longest[key]))]

    def _windows(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Groups of equal prefix length, as many as may be kept at a time."""
        for _, same in groupby(groups, key=lambda group: len(group.prefix)):
            window: list[_Group] = []
            held = 0
            for group in same:
                cost = max(len(group.prefix), group.prompts[0].ids.count(IMAGE_TOKEN_ID), 1)
                if window and held + cost > self.tokens:
                    yield window
                    window, held = [], 0
                window.append(group)
                held += cost
            yield window

    def _answer_window(self, window: list[_Group]) -> Iterator[list[Reply]]:
        past = len(window[0].prefix)
        prefixes = self._prefixes(window) if past else None
        rows = [(place, prompt) for place, group in enumerate(window) for prompt in group.prompts]
        rows.sort(key=lambda row: -len(row[1].ids))
        for batch in self._batches([prompt for _, prompt in rows], past):
            places, rows = [place for place, _ in rows[: len(batch)]], rows[len(batch) :]
            cache = (
                new_cache(self.model.llm)
                if prefixes is None
                else select_rows(prefixes, torch.tensor(places, device=self.device))
            )
            lengths = [len(prompt.ids) - past for prompt in batch]
            embeddings = self._embed([prompt.ids[past:] for prompt in batch], [] if past else _images(batch))
            found = decode_batch(
                self.model.llm, cache, past, embeddings, lengths, self.ends, self.max_new_tokens, _check_stop
            )
            yield [self._settled(prompt, answer, len(batch)) for prompt, answer in zip(batch, found, strict=True)]

    def _settled(self, prompt: Prompt, answer: Continued, rows: int) -> Reply:
        """The row's own answer, or after a near-tie the reference's."""
        if not answer.tied:
            return self._reply(prompt, answer, rows, alone=False)
        self.near_ties += 1
        again = self._alone(prompt)
        again.seconds += answer.seconds
        return self._reply(prompt, again, rows, alone=True)

    def _batches(self, prompts: list[Prompt], past: int) -> Iterator[list[Prompt]]:
        """Cut prompts, longest first, into batches within both bounds; of equal length where padding would change them."""
        batch: list[Prompt] = []
        for prompt in prompts:
            if batch:
                full = len(batch) == self.rows or (len(batch) + 1) * self._cost(batch[0]) > self.tokens
                pads = past > 0 and self._can_pad(self._cost(batch[0]))
                if full or (not pads and len(prompt.ids) != len(batch[0].ids)):
                    yield batch
                    batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _cost(self, prompt: Prompt) -> int:
        return len(prompt.ids) + self.max_new_tokens

    def _can_pad(self, tokens: int) -> bool:
        return self.kind.pads(tokens) and getattr(self.model.llm.config, "_attn_implementation", "") in MASKING

    @torch.no_grad()
    def _prefixes(self, window: list[_Group]) -> DynamicCache:
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
    def _embed(self, rows: Sequence[Sequence[int]], images: Sequence[str]) -> Tensor:
        """(B, S, Dl) of token ids, shorter rows padded on the left, with the features of `images` at the placeholders."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self.device)
        features = torch.cat([self._features[key] for key in images]) if images else None
        sizes = (torch.tensor([self.sizes[key] for key in images]),) if images and self.sizes is not None else ()
        return self.model.embed(ids, None, features, *sizes)[0]

    def _alone(self, prompt: Prompt) -> Continued:
        embeddings = self._embed([prompt.ids], prompt.images)
        return decode_alone(self.model.llm, embeddings, self.ends, self.max_new_tokens, _check_stop)

    def _reply(self, prompt: Prompt, answer: Continued, rows: int, alone: bool) -> Reply:
        return Reply(prompt.item_id, answer.ids, len(prompt.ids), answer.steps, answer.seconds, rows, alone)

    @torch.no_grad()
    def _encode(self, window: list[_Group]) -> None:
        """Run the tower on the window's images that no earlier window has left."""
        keys = [key for key in dict.fromkeys(k for group in window for k in group.images) if key not in self._features]
        for first in range(0, len(keys), ENCODE_IMAGES):
            _check_stop()
            chunk = keys[first : first + ENCODE_IMAGES]
            views = [pixels if self.sizes is not None else pixels[None] for pixels in map(self.load, chunk)]
            features = self.model.tower_features(torch.cat(views))
            self._features |= dict(zip(chunk, features.split([len(view) for view in views]), strict=True))
            self.images_encoded += len(chunk)

    def _forget(self, window: list[_Group]) -> None:
        """Let go of images that no later window asks about."""
        for key in (key for group in window for key in group.images):
            self._uses[key] -= 1
            if self._uses[key] == 0:
                del self._features[key]


def _images(prompts: Sequence[Prompt]) -> list[str]:
    return [key for prompt in prompts for key in prompt.images]


def _shared_lengths(prompts: Sequence[Prompt]) -> dict[int, int]:
    """How long the prefixes are: where the images end -> there, and on for as long as all such prompts say the same.

    Prompts that end with an image have nothing left to ask behind a prefix; they share none.
    """
    tails: dict[int, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        end = _behind_images(prompt)
        tails.setdefault(end, []).append(prompt.ids[end:])
    return {end: end + _common(rows) if all(rows) else 0 for end, rows in tails.items()}


def _behind_images(prompt: Prompt) -> int:
    """Index behind the last image token, 0 where there is none."""
    return len(prompt.ids) - prompt.ids[::-1].index(IMAGE_TOKEN_ID) if prompt.images else 0


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of what all rows begin with, less one token of the shortest: something must be left to ask."""
    first, last = min(rows), max(rows)  # in lexical order all others lie between them
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(len(row) for row in rows) - 1)


def _check_stop() -> None:
    if stop_requested():
        raise StoppedError("stopped while generating; the same command continues with the questions not answered yet")
