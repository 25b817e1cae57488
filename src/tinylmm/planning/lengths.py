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

from tinylmm.config.video import SamplingSpec
from tinylmm.data.clip_list import read_clips
from tinylmm.data.frame_sampling import frame_count
from tinylmm.sizing.layers import UnknownShapeError


@dataclass(frozen=True)
class Lengths:
    """Samples of a training.

    Attributes:
        samples: how many an epoch has; None where nobody knows.
        tokens, deviation: mean and standard deviation of their positions, images counted in, cut at `max_length`.
        squared: mean of the squares.
        supervised: mean of the positions that are learnt.
        images: mean number of images,
        clips: of videos, and
        frames: of the frames of them that are shown.
        read: whether they were read from prepared data.
    """

    samples: int | None
    tokens: float
    deviation: float
    squared: float
    supervised: float
    images: float
    read: bool
    clips: float = 0.0
    frames: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
        folder: output of its prepare stage.
        weight: how often an epoch has each of its samples.
        supervised: mean of the positions of a sample that are learnt, as the stage's summary has it.
        checked: output of its images stage.
    """

    folder: Path
    weight: float
    supervised: float
    checked: Path | None = None


@dataclass(frozen=True)
class ClipTokens:
    """Positions that a clip takes: so many, and so many more a frame."""

    fixed: int = 0
    a_frame: int = 0


def read_lengths(
    sources: Sequence[Prepared], image_tokens: int, max_length: int, clip_tokens: ClipTokens = ClipTokens()
) -> Lengths:
    """Lengths of prepared sources: of each sample how long it is, not what is in it.

    Raises:
        UnknownShapeError: a file of theirs is damaged.
    """
    tables = [_table(source) for source in sources]
    counts, learnt = (
        np.concatenate([np.full(len(table), value) for table, value in zip(tables, values, strict=True)])
        for values in ([source.weight for source in sources], [source.supervised for source in sources])
    )
    text, slots, clips, frames = np.concatenate(tables).T.astype(np.float64)
    images = slots - clips
    seen = images * image_tokens + clips * clip_tokens.fixed + frames * clip_tokens.a_frame
    tokens = np.minimum(text - slots + seen, max_length)
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
        clips=float((clips * counts).sum() / total),
        frames=float((frames * counts).sum() / total),
    )


def _table(source: Prepared) -> np.ndarray:
    """(samples, 4): ids, images and videos, videos, and frames of them, of each prepared sample."""
    import pyarrow.compute as pc

    shown = {} if source.checked is None else {name: len(frames) for name, frames in read_clips(source.checked).items()}
    rows = []
    for batch in _batches(sorted((source.folder / "samples").glob("*.arrow"))):
        columns = [
            pc.list_value_length(batch.column(name)).to_numpy(zero_copy_only=False) for name in ("input_ids", "images")
        ]
        names = batch.column("images").to_pylist() if shown else [()] * len(batch)
        clips = [[shown[name] for name in row if name in shown] for row in names]
        rows.append(np.stack([*columns, np.array(list(map(len, clips))), np.array(list(map(sum, clips)))], axis=1))
    return np.concatenate(rows) if rows else np.zeros((0, 4))


def _batches(files: Sequence[Path]) -> Iterator[Any]:
    import pyarrow as pa

    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                yield from reader
        except (OSError, pa.ArrowInvalid) as error:
            raise UnknownShapeError(f"the prepared samples in {file} cannot be read ({error})") from error


def assumed_lengths(
    data: str,
    mixture: Mapping[str, float],
    captions: bool,
    image_tokens: int,
    max_length: int,
    clip_tokens: ClipTokens = ClipTokens(),
    sampling: SamplingSpec | None = None,
) -> Lengths:
    """Lengths of sources that are not prepared yet.

    Args:
        data: name of the data set.
        mixture: source -> how often an epoch has each of its samples.
        captions: whether they are rendered as captions: what a source of an unknown data set is taken for.
        sampling: which frames of videos are shown.
    """
    known, usual = _assumed()["data_sets"].get(data, {}), _assumed()["captions" if captions else "instructions"]
    rows, weights = [known.get(source, usual) for source in mixture], list(mixture.values())
    counted = all(row["samples"] is not None for row in rows)
    shares = [weight * (row["samples"] if counted else 1) for row, weight in zip(rows, weights, strict=True)]
    text, supervised, images = (
        sum(row[key] * share for row, share in zip(rows, shares, strict=True)) / sum(shares)
        for key in ("text", "supervised", "images")
    )
    clips = sum(row.get("videos", 0.0) * share for row, share in zip(rows, shares, strict=True)) / sum(shares)
    frames = 0 if sampling is None else clips * frame_count(sampling, _assumed()["seconds_of_a_video"])
    seen = images * image_tokens + clips * clip_tokens.fixed + frames * clip_tokens.a_frame
    tokens = min(text + seen, max_length)
    deviation = text / 2
    samples = round(sum(shares)) if counted else None
    squared, supervised = tokens**2 + deviation**2, min(supervised, tokens)
    return Lengths(samples, tokens, deviation, squared, supervised, images, read=False, clips=clips, frames=frames)


@cache
def _assumed() -> dict[str, Any]:
    text = resources.files("tinylmm.sizing").joinpath("assumed.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
