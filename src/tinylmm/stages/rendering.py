"""Records become rows of token ids, piece by piece, in any process.

Neither torch nor datasets is loaded here: a process that only renders would take seconds and memory for them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tinylmm.constants import IGNORE_INDEX
from tinylmm.data.chat import ChatTemplate, Rendered
from tinylmm.data.sample import BadRecord, Sample, parse_record
from tinylmm.stages.chunks import Chunk, ChunkFolder, hashed
from tinylmm.stages.images import names_of
from tinylmm.stages.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 2048
"""Records that a process takes at a time, and that are kept at a time,"""
CHUNK_BYTES = 16 << 20
"""or fewer, where so many bytes of them are reached."""
SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True)
class Piece:
    """Some records of a file, on their way to whatever process renders them.

    Attributes:
        number: of the chunk that they become.
        first: place of the first one in the file.
        records: each pickled, so that how much memory they take is known.
    """

    number: int
    first: int
    records: list[bytes]


def pieces_of(records: Iterable[Any]) -> Iterator[Piece]:
    """Cut a file into pieces of CHUNK records, or fewer where they are large: the same pieces at every try."""
    number = first = size = 0
    batch: list[bytes] = []
    for record in records:
        batch.append(pickle.dumps(record))
        size += len(batch[-1])
        if len(batch) == CHUNK or size >= CHUNK_BYTES:
            yield Piece(number, first, batch)
            number, first, size, batch = number + 1, first + len(batch), 0, []
    if batch:
        yield Piece(number, first, batch)


@dataclass(frozen=True)
class Renderer:
    """Makes chunks of pieces; travels to other processes.

    Attributes:
        template: fitted to the tokenizer.
        faults: image -> what is wrong with it, of those that cannot be used.
        kept: where chunks are written.
        videos: records with videos are samples.
    """

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerBase
    source: Source
    faults: Mapping[str, str]
    kept: ChunkFolder
    videos: bool = False

    def __call__(self, piece: Piece) -> Chunk:
        """Return a piece's chunk: the one that is kept already, or a new one, which is kept from now on."""
        done = self.kept.read(piece.number)
        if done is not None and done.records == len(piece.records):
            return done
        bad: list[BadRecord] = []
        rows: list[tuple[str, Rendered, tuple[str, ...]]] = []
        for index, pickled in enumerate(piece.records, piece.first):
            sample = parse_record(index, pickle.loads(pickled), self.source.format, self.videos)
            if isinstance(sample, BadRecord):
                bad.append(sample)
                continue
            images, rendered = names_of(sample, self.source.images), self.render(sample)
            if (fault := self._fault(images, rendered)) is not None:
                bad.append(BadRecord(index, sample.sample_id, fault))
            else:
                rows.append((sample.sample_id, rendered, images))
        tokens = sum(len(rendered.input_ids) for _, rendered, _ in rows)
        ids = hashed([*(row[0] for row in rows), *(one.sample_id for one in bad)])
        chunk = Chunk(len(piece.records), bad, tokens, sum(_supervised(row[1]) for row in rows), ids)
        self.kept.write(piece.number, chunk, _table(rows))
        return chunk

    def render(self, sample: Sample) -> Rendered:
        """Token ids and labels of a sample."""
        return self.template.render(sample.turns, self.tokenizer, sample.system)

    def _fault(self, images: Iterable[str], rendered: Rendered) -> str | None:
        """Why a rendered sample cannot be used, or None."""
        faults = [self.faults[name] for name in images if name in self.faults]
        if not _supervised(rendered):
            faults.append("no token of it would be trained on")
        return " ".join(dict.fromkeys(faults)) or None


def _supervised(rendered: Rendered) -> int:
    return len(rendered.labels) - rendered.labels.count(IGNORE_INDEX)


def _table(rows: list[tuple[str, Rendered, tuple[str, ...]]]) -> pa.Table:
    """Rows as columns; of numbers through numpy, which is ten times faster than one by one."""
    columns = {
        "sample_id": pa.array([name for name, _, _ in rows], pa.string()),
        "input_ids": _lists([rendered.input_ids for _, rendered, _ in rows]),
        "labels": _lists([rendered.labels for _, rendered, _ in rows]),
        "images": pa.array([list(images) for _, _, images in rows], pa.list_(pa.string())),
    }
    return pa.table(columns, schema=SCHEMA)


def _lists(values: list[list[int]]) -> pa.Array:
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(values), np.int32, int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))
