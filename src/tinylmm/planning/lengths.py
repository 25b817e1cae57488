"""What the samples of a training are like: as prepared, or else as `sizing/assumed.yaml` has it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tinylmm.sizing.layers import UnknownShapeError


@dataclass(frozen=True)
class Lengths:
    """Samples of a training.

    Attributes:
        samples: how many an epoch has; None where nobody knows.
        tokens, deviation: mean and standard deviation of their positions, images counted in, cut at `max_length`.
        squared: mean of the squares.
        supervised: mean of the positions that are learnt.
        images: mean number of images.
        read: whether they were read from prepared data.
    """

    samples: int | None
    tokens: float
    deviation: float
    squared: float
    supervised: float
    images: float
    read: bool


@dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
        folder: output of its prepare stage.
        weight: how often an epoch has each of its samples.
        supervised: mean of the positions of a sample that are learnt, as the stage's summary has it.
    """

    folder: Path
    weight: float
    supervised: float


def read_lengths(sources: Sequence[Prepared], image_tokens: int, max_length: int) -> Lengths:
    """Lengths of prepared sources: of each sample how long it is, not what is in it.

    Raises:
        UnknownShapeError: a file of theirs is damaged.
    """
    tables = [_table(source.folder) for source in sources]
    counts, learnt = (
        np.concatenate([np.full(len(table), value) for table, value in zip(tables, values, strict=True)])
        for values in ([source.weight for source in sources], [source.supervised for source in sources])
    )
    text, images = np.concatenate(tables).T.astype(np.float64)
    tokens = np.minimum(text + images * (image_tokens - 1), max_length)
    total = max(counts.sum(), 1e-9)
    mean, squared = float((tokens * counts).sum() / total), float((tokens**2 * counts).sum() / total)
    return Lengths(
        samples=round(total),
        tokens=mean,
        deviation=max(squared - mean**2, 0.0) ** 0.5,
        squared=squared,
        supervised=float((learnt * counts).sum() / total),
        images=float((images * counts).sum() / total),
        read=True,
    )


def _table(folder: Path) -> np.ndarray:
    """(samples, 2): ids and images of each prepared sample."""
    import pyarrow.compute as pc

    rows = [
        np.stack(
            [
                pc.list_value_length(batch.column(name)).to_numpy(zero_copy_only=False)
                for name in ("input_ids", "images")
            ],
            axis=1,
        )
        for batch in _batches(sorted((folder / "samples").glob("*.arrow")))
    ]
    return np.concatenate(rows) if rows else np.zeros((0, 2))


def _batches(files: Sequence[Path]) -> Iterator[Any]:
    import pyarrow as pa

    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                yield from reader
        except (OSError, pa.ArrowInvalid) as error:
            raise UnknownShapeError(f"the prepared samples in {file} cannot be read ({error})") from error


def assumed_lengths(
    data: str, mixture: Mapping[str, float], captions: bool, image_tokens: int, max_length: int
) -> Lengths:
    """Lengths of sources that are not prepared yet.

    Args:
        data: name of the data set.
        mixture: source -> how often an epoch has each of its samples.
        captions: whether they are rendered as captions: what a source of an unknown data set is taken for.
    """
    known, usual = _assumed()["data_sets"].get(data, {}), _assumed()["captions" if captions else "instructions"]
    rows, weights = [known.get(source, usual) for source in mixture], list(mixture.values())
    counted = all(row["samples"] is not None for row in rows)
    shares = [weight * (row["samples"] if counted else 1) for row, weight in zip(rows, weights, strict=True)]
    text, supervised, images = (
        sum(row[key] * share for row, share in zip(rows, shares, strict=True)) / sum(shares)
        for key in ("text", "supervised", "images")
    )
    tokens = min(text + images * image_tokens, max_length)
    deviation = text / 2
    samples = round(sum(shares)) if counted else None
    return Lengths(samples, tokens, deviation, tokens**2 + deviation**2, min(supervised, tokens), images, read=False)


@cache
def _assumed() -> dict[str, Any]:
    text = resources.files("tinylmm.sizing").joinpath("assumed.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
