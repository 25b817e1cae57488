"""Prepared samples as a stage trains on them: memory-mapped, cut to `max_length`, each image's pixels or cached features."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from tinylmm.data.collate import ImageTokens, sample_length, supervised_after_cut
from tinylmm.data.image_folders import in_mixture
from tinylmm.errors import DataError
from tinylmm.stop import belong_to

log = logging.getLogger(__name__)

LISTED = 20


@dataclass(frozen=True)
class LengthReport:
    """What `max_length` did to the data; goes into the stage's manifest.

    Attributes:
        cut: samples that lost tokens at their end. cut_ids: the first 20 of them.
        dropped: samples left out because no supervised token was left. dropped_ids: the first 20 of them.
    """

    samples: int
    tokens: int
    cut: int
    cut_ids: list[str]
    dropped: int
    dropped_ids: list[str]

    def left_out(self, max_length: int) -> str:
        """What was left out and why, the beginning of a sentence."""
        total = self.samples + self.dropped
        return (
            f"{self.dropped:,} of {total:,} samples ({self.dropped / total:.1%}) are left out: max_length={max_length} "
            "leaves them no token to learn"
        )


class PreparedSamples(Dataset[dict[str, Any]]):
    """Rows of `prepare` stages by index, without those that `max_length` leaves nothing of.

    Args:
        folders: output of the prepare stage of each source, in the mixture's order.
        image_tokens: Q, tokens an image takes, or name -> tokens where images are tiled.
        max_length: tokens a sample may have, image tokens counted in.
        max_dropped: share of the samples that may be left out.

    Attributes:
        sizes: samples of each source, which lie one behind the other.
        lengths: positions of each sample, (len(self),) int64, cut at `max_length`.

    Raises:
        DataError: more samples would be left out, or none would be left to train on.
    """

    def __init__(
        self, folders: Sequence[Path], image_tokens: ImageTokens, max_length: int, max_dropped: float = 1.0
    ) -> None:
        parts = [datasets.load_from_disk(str(folder / "samples")) for folder in folders]
        self.rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        table = self.rows.data.table
        text = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
        images = pc.list_value_length(table["images"]).to_numpy().astype(np.int64)
        lengths = text - images + self._image_lengths(images, image_tokens)
        too_long = np.flatnonzero(lengths > max_length).tolist()
        dropped = [i for i in too_long if supervised_after_cut(self._record(i), image_tokens, max_length) == 0]
        kept = np.setdiff1d(np.arange(len(text)), dropped)
        cut = sorted(set(too_long) - set(dropped))
        self.index = kept
        self.lengths = np.minimum(lengths[kept], max_length)
        self.sizes = np.diff(np.searchsorted(kept, self.starts)).tolist()
        self.report = LengthReport(
            samples=len(kept),
            tokens=int(self.lengths.sum()),
            cut=len(cut),
            cut_ids=[self.rows[i]["sample_id"] for i in cut[:LISTED]],
            dropped=len(dropped),
            dropped_ids=[self.rows[i]["sample_id"] for i in dropped[:LISTED]],
        )
        if cut or dropped:
            log.warning(
                "max_length %d: %d samples cut, %d left out (ids in the manifest)", max_length, len(cut), len(dropped)
            )
        if len(dropped) > max_dropped * len(text) or not len(kept):
            raise DataError(
                f"{self.report.left_out(max_length)}, and {max_dropped:.1%} may be (max_dropped). "
                f"The first of them: {', '.join(self.report.dropped_ids[:5])}. Raise the stage's max_length, choose a "
                "connector or an image mode with fewer tokens an image, show fewer frames of videos, or raise the "
                "stage's max_dropped to train without them."
            )

    def _image_lengths(self, images: Any, image_tokens: ImageTokens) -> Any:
        """Positions that the images of each row take, from how many (rows,) there are."""
        if isinstance(image_tokens, int):
            return images * image_tokens
        tokens = {name: image_tokens(name) for name in self.images()}
        names = (self._names(row, own) for row, own in enumerate(self.rows["images"]))
        return np.array([sum(tokens[name] for name in row) for row in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._record(int(self.index[index]))

    def _record(self, row: int) -> dict[str, Any]:
        record: dict[str, Any] = self.rows[row]
        return record | {"images": self._names(row, record["images"])}

    def _names(self, row: int, own: list[str]) -> list[str]:
        """Names of a row's images, which a mixture marks with the source."""
        if len(self.starts) == 2:
            return own
        position = int(np.searchsorted(self.starts, row, side="right")) - 1
        return [in_mixture(position, name) for name in own]

    def images(self) -> list[str]:
        """Distinct image names, sorted."""
        column = self.rows.data.table["images"].combine_chunks()
        names: set[str] = set()
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            names |= set(self._names(start, list(set(column.slice(start, end - start).flatten().to_pylist()))))
        return sorted(names)


__all__ = ["LengthReport", "PreparedSamples", "sample_length"]


def start_reader(number: int) -> None:
    """In worker `number` of a loader: a signal to every process of the run must not end it in the middle of a save."""
    rank = multiprocessing.parent_process()
    assert rank is not None and rank.pid is not None, "a worker is started by a rank"
    belong_to(rank.pid)
