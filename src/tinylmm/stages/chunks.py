"""Chunks of prepared rows on disk, so that a stage that was stopped or killed goes on behind the last whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tinylmm.data.sample import BadRecord
from tinylmm.store.integrity import write_atomic


@dataclass
class Chunk:
    """What was made of some records of a file; the rows of those that can be trained on lie in the chunk's file.

    Attributes:
        records: how many there were, good and bad.
        bad: those that cannot be used.
        tokens, supervised_tokens: of all rows.
        ids: (records,) uint64, hashes of the records' ids.
    """

    records: int
    bad: list[BadRecord]
    tokens: int
    supervised_tokens: int
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def samples(self) -> int:
        """Rows of the chunk."""
        return self.records - len(self.bad)


def hashed(ids: Iterable[str]) -> np.ndarray:
    """64-bit hashes of texts: enough to count how many there are."""
    digests = (hashlib.blake2b(one.encode("utf-8", "surrogatepass"), digest_size=8).digest() for one in ids)
    return np.frombuffer(b"".join(digests), np.uint64)


class ChunkFolder:
    """Numbered chunks: `N.arrow` with the rows, and `N.json`, written last, with the rest and the SHA-256 of the rows.

    Args:
        folder: of one stage; another stage's digest has another folder.
        schema: of the rows.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema

    def write(self, number: int, chunk: Chunk, rows: pa.Table) -> None:
        """Keep a chunk; from here on `read` has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as writer:
            writer.write_table(rows)
        content = sink.getvalue().to_pybytes()
        rest = {name: getattr(chunk, name) for name in ("records", "tokens", "supervised_tokens")}
        record = {"sha256": hashlib.sha256(content).hexdigest(), "bad": [asdict(bad) for bad in chunk.bad], **rest}
        write_atomic(self.folder / f"{number}.arrow", content, durable=False)
        write_atomic(self.folder / f"{number}.json", json.dumps(record), durable=False)

    def read(self, number: int) -> Chunk | None:
        """Return a chunk, or None if it is not there, or not whole."""
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{number}.json").read_text(encoding="utf-8"))
            content = (self.folder / f"{number}.arrow").read_bytes()
            if hashlib.sha256(content).hexdigest() != record.pop("sha256"):
                return None
            record["bad"] = [BadRecord(**bad) for bad in record["bad"]]
            rows = pa.ipc.open_stream(content).read_all()
            ids = [*rows["sample_id"].to_pylist(), *(bad.sample_id for bad in record["bad"])]
            return Chunk(**record, ids=hashed(ids))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a power cut left half of it
            return None

    def tables(self, count: int) -> Iterator[pa.Table]:
        """Yield the rows of the first `count` chunks, in order."""
        for number in range(count):
            with pa.OSFile(str(self.folder / f"{number}.arrow")) as source:
                yield pa.ipc.open_stream(source).read_all()
