"""Live figures of a training: how fast it is, at what share of the device's rate, and what it waits for.

Numbers of a batch are counted where it is made, on the CPU, and travel with it as plain numbers; time is the host's. So a step
never waits for the device on their account: they are put together at logging steps, where Trainer reads the loss anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.data.collate import ImageTokens, image_widths, kept_after_cut
from tinylmm.data.slots import positions_of
from tinylmm.store.pixels import PixelShelf
from tinylmm.store.provenance import peak_rss_mib
from tinylmm.training.cost import Cost
from tinylmm.training.ranks import over_ranks, world_size
from tinylmm.training.trainer import LMMTrainer

COUNTS = "counts"
"""Key of a batch under which its `Counts` travel."""
GIB = 1024**3


@dataclass
class Counts:
    """What passed through a training.

    Attributes:
        samples, tokens: and the positions they take, images counted in.
        squared: sum of the squares of samples' lengths, which attention goes by.
        image_tokens: positions of images.
        supervised: positions that are learnt.
        views: images, or tiles of them, whose features went in.
        positions: with padding. rows: that these are in.
        pixel_reads: images read through the pixel cache. pixel_hits: those of them that were kept.
    """

    samples: float = 0.0
    tokens: float = 0.0
    squared: float = 0.0
    image_tokens: float = 0.0
    supervised: float = 0.0
    views: float = 0.0
    positions: float = 0.0
    rows: float = 0.0
    pixel_reads: float = 0.0
    pixel_hits: float = 0.0

    def add(self, other: Counts) -> None:
        """Take another's numbers in."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Counted:
    """A collator that also says what is in its batches.

    Args:
        collate: samples -> batch, as `data/collate.py` has it.
        image_tokens: positions that an image takes.
        max_length: of a sample.
        pixels: the pixel cache that images are read through.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Any]],
        image_tokens: ImageTokens,
        max_length: int,
        pixels: PixelShelf | None = None,
    ) -> None:
        self.collate = collate
        self.pixels = pixels
        self.image_tokens = image_tokens
        self.max_length = max_length

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """Collate, and count."""
        batch = self.collate(samples)
        lengths = [self._length(sample) for sample in samples]
        features = next((batch[key] for key in ("pixel_values", "image_features") if batch.get(key) is not None), ())
        reads, hits = (0, 0) if self.pixels is None else self.pixels.take()
        batch[COUNTS] = Counts(
            samples=len(samples),
            tokens=sum(lengths),
            squared=sum(length**2 for length in lengths),
            image_tokens=int((batch["input_ids"] == IMAGE_TOKEN_ID).sum()),
            supervised=int((batch["targets"] != IGNORE_INDEX).sum()),
            views=len(features),
            positions=batch["input_ids"].numel(),
            rows=len(batch["input_ids"]),
            pixel_reads=reads,
            pixel_hits=hits,
        )
        return batch

    def _length(self, sample: dict[str, Any]) -> int:
        widths = positions_of(sample["input_ids"], image_widths(sample, self.image_tokens))
        return kept_after_cut(sample["input_ids"], widths, self.max_length)[1]


class Figures(TrainerCallback):
    """Counts what a training takes in and says at logging steps how fast that was.

    Args:
        cost: what samples cost, and what the device can do.
        after_s: seconds that the run takes when this training is done, as far as that is known.

    Attributes:
        pixels: images that this rank has read through the pixel cache so far, and those of them that were kept.
    """

    def __init__(self, cost: Cost, after_s: float | None = None) -> None:
        self.cost = cost
        self.after_s = after_s
        self.pixels = (0.0, 0.0)
        self._counts = Counts()
        self._waited = 0.0
        self._step, self._time = 0, time.monotonic()
        self._pace: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the step that training starts or resumes from."""
        self._step, self._time = state.global_step, time.monotonic()

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass batches on, counted, and note how long each was waited for."""
        source = iter(batches)
        while True:
            begun = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - begun
            counts = batch.pop(COUNTS)
            self._counts.add(counts)
            self.pixels = self.pixels[0] + counts.pixel_reads, self.pixels[1] + counts.pixel_hits
            yield batch

    def take(self, step: int, steps: int) -> dict[str, float]:
        """What happened since the last call, over all ranks; every rank must call it.

        Returns:
            samples_per_s, and tokens_per_s with its parts: of text, of images, and those that are learnt; data_wait, share
            of the time that ranks waited for batches; padding, share of positions; samples_per_row; pixel_reads and
            pixel_hit_rate, where there is a pixel cache; peak_memory_gib, of the rank with most (a GPU's allocated, else
            resident); mfu and peak_share, where they are known; eta_s, run_eta_s.
        """
        now = time.monotonic()
        seconds, done = max(now - self._time, 1e-9), step - self._step
        (*numbers, waited), peak = over_ranks([*astuple(self._counts), self._waited / world_size()], _peak_gib())
        counts = Counts(*numbers)
        self._counts, self._waited, self._step, self._time = Counts(), 0.0, step, now
        figures: dict[str, float] = {"peak_memory_gib": round(peak, 3)}
        if done > 0 and counts.samples:
            figures |= _rates(counts, seconds) | {"data_wait": round(min(1.0, waited / seconds), 4)}
            shares = self.cost.shares(counts.samples, counts.tokens, counts.squared, counts.supervised, counts.views)
            figures |= {name: float(f"{value / seconds:.4g}") for name, value in shares.items()}
        return figures | self._left(step, steps, now)

    def _left(self, step: int, steps: int, now: float) -> dict[str, float]:
        """Seconds until this stage, and the run, are done: at the pace since the first row, which had the start-up in it."""
        if self._pace is None or step <= self._pace[0]:
            self._pace = (step, now)
            return {}
        eta = (now - self._pace[1]) / (step - self._pace[0]) * (steps - step)
        run = {} if self.after_s is None else {"run_eta_s": round(eta + self.after_s, 1)}
        return {"eta_s": round(eta, 1), **run}


class MeasuredTrainer(LMMTrainer):
    """A trainer that says how fast it is, in every row that it logs.

    Args:
        figures: keeps count.
        others: as `LMMTrainer` takes them; its `collate` must be a `Counted`.
    """

    def __init__(self, figures: Figures, **others: Any) -> None:
        self.figures = figures
        super().__init__(**others)
        self.add_callback(figures)

    def watched(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass a step's batches on, counted."""
        return self.figures.watch(batches)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures to a row of losses, so that every tracker has them."""
        if "loss" in logs:
            logs |= self.figures.take(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)


def _rates(counts: Counts, seconds: float) -> dict[str, float]:
    each = {
        "samples_per_s": counts.samples,
        "tokens_per_s": counts.tokens,
        "text_tokens_per_s": counts.tokens - counts.image_tokens,
        "image_tokens_per_s": counts.image_tokens,
        "supervised_tokens_per_s": counts.supervised,
    }
    shared = {
        "padding": round(1 - counts.tokens / max(counts.positions, 1.0), 4),
        "samples_per_row": round(counts.samples / max(counts.rows, 1.0), 2),
    }
    if counts.pixel_reads:
        hit_rate = round(counts.pixel_hits / counts.pixel_reads, 4)
        shared |= {"pixel_reads": counts.pixel_reads, "pixel_hit_rate": hit_rate}
    return {name: round(value / seconds, 2) for name, value in each.items()} | shared


def _peak_gib() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    return peak_rss_mib() / 1024
