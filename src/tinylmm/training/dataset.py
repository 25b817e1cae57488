"""Prepared samples as a stage trains on them: memory-mapped, cut to `max_length`, each image's pixels or cached features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from tinylmm.data.collate import sample_length, supervised_after_cut
from tinylmm.data.image_folders import in_mixture
from tinylmm.errors import DataError

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


class PreparedSamples(Dataset[dict[str, Any]]):
    """Rows of `prepare` stages by index, without those that `max_length` leaves nothing of.

    Args:
        folders: output of the prepare stage of each source, in the mixture's order.
        image_tokens: Q, tokens an image takes.
        max_length: tokens a sample may have, image tokens counted in.

    Attributes:
        sizes: samples of each source, which lie one behind the other.

    Raises:
        DataError: nothing is left to train on.
    """

    def __init__(self, folders: Sequence[Path], image_tokens: int, max_length: int) -> None:
        parts = [datasets.load_from_disk(str(folder / "samples")) for folder in folders]
        self.rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        table = self.rows.data.table
        text = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
        images = pc.list_value_length(table["images"]).to_numpy().astype(np.int64)
        lengths = text + images * (image_tokens - 1)
        too_long = np.flatnonzero(lengths > max_length).tolist()
        dropped = [i for i in too_long if supervised_after_cut(self.rows[i], image_tokens, max_length) == 0]
        kept = np.setdiff1d(np.arange(len(text)), dropped)
        cut = sorted(set(too_long) - set(dropped))
        self.index = kept
        self.sizes = np.diff(np.searchsorted(kept, self.starts)).tolist()
        self.report = LengthReport(
            samples=len(kept),
            tokens=int(np.minimum(lengths[kept], max_length).sum()),
            cut=len(cut),
            cut_ids=[self.rows[i]["sample_id"] for i in cut[:LISTED]],
            dropped=len(dropped),
            dropped_ids=[self.rows[i]["sample_id"] for i in dropped[:LISTED]],
        )
        if cut or dropped:
            log.warning(
                "max_length %d: %d samples cut, %d left out (ids in the manifest)", max_length, len(cut), len(dropped)
            )
        if not len(kept):
            raise DataError(
                f"no sample of {', '.join(map(str, folders))} has a supervised token within max_length {max_length}; raise it"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.index[index])
        record: dict[str, Any] = self.rows[row]
        if len(self.sizes) > 1:
            position = int(np.searchsorted(self.starts, row, side="right")) - 1
            record["images"] = [in_mixture(position, name) for name in record["images"]]
        return record

    def images(self) -> list[str]:
        """Distinct image names, sorted."""
        column = self.rows.data.table["images"].combine_chunks()
        names = set()
        for position, (start, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            own = column.slice(start, end - start).flatten().to_pylist()
            names |= set(own) if len(self.sizes) == 1 else {in_mixture(position, name) for name in set(own)}
        return sorted(names)


__all__ = ["LengthReport", "PreparedSamples", "sample_length"]
