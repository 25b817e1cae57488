"""Chunks of prepared rows on disk, so that a stage that was stopped or killed goes on behind the last whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from tinylmm.data.sample import BadRecord
from tinylmm.store.integrity import write_atomic


@dataclass
class Chunk:
    """What was made of some records of a file.

    Attributes:
        rows: of the samples that can be trained on.
        records: how many there were, good and bad.
        bad: those that cannot be used.
        checked: image path -> what is wrong with it, or None; of images that no earlier chunk has.
        tokens, supervised_tokens: of all rows.
    """

    rows: pa.Table
    records: int
    bad: list[BadRecord] = field(default_factory=list)
    checked: dict[str, str | None] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0


class ChunkFolder:
    """Numbered chunks: `N.arrow` with the rows, and `N.json`, written last, with the rest and the SHA-256 of the rows.

    Args:
        folder: of one stage; another stage's digest has another folder.
        schema: of the rows.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema

    def write(self, number: int, chunk: Chunk) -> None:
        """Keep a chunk; from here on `read` has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as writer:
            writer.write_table(chunk.rows)
        rows = sink.getvalue().to_pybytes()
        rest = {name: getattr(chunk, name) for name in ("records", "checked", "tokens", "supervised_tokens")}
        record = {"sha256": hashlib.sha256(rows).hexdigest(), "bad": [asdict(bad) for bad in chunk.bad], **rest}
        write_atomic(self.folder / f"{number}.arrow", rows, durable=False)
        write_atomic(self.folder / f"{number}.json", json.dumps(record), durable=False)

    def read(self, number: int) -> Chunk | None:
        """Return a chunk, or None if it is not there, or not whole."""
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{number}.json").read_text(encoding="utf-8"))
            rows = (self.folder / f"{number}.arrow").read_bytes()
            if hashlib.sha256(rows).hexdigest() != record.pop("sha256"):
                return None
            record["bad"] = [BadRecord(**bad) for bad in record["bad"]]
            return Chunk(pa.ipc.open_stream(rows).read_all(), **record)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a power cut left half of it
            return None

    def tables(self, count: int) -> Iterator[pa.Table]:
        """Yield the rows of the first `count` chunks, in order."""
        for number in range(count):
            with pa.OSFile(str(self.folder / f"{number}.arrow")) as source:
                yield pa.ipc.open_stream(source).read_all()
