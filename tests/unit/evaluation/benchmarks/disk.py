"""Writes benchmark files the way their publishers do, and answers to score."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Item, Scores
from tinylmm.evaluation.judge import Judge


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (4, 3)) -> bytes:
    """A small picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_image(path: Path, data: bytes | None = None) -> Path:
    """Write an image file, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or png())
    return path


def cell(data: bytes | None) -> dict[str, Any] | None:
    """An image as `datasets` writes it into parquet."""
    return None if data is None else {"bytes": data, "path": "image.png"}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as a parquet file, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def given(texts: Mapping[Any, str]) -> dict[str, Answer]:
    """Answers by item id."""
    return {str(name): Answer(text) for name, text in texts.items()}


def scored(
    benchmark: Benchmark,
    items: Sequence[Item],
    texts: Mapping[Any, str],
    variant: str | None = None,
    judge: Judge | None = None,
) -> Scores:
    """Join an answer file's rows as `tinylmm score` does, and score."""
    rows = [{"question_id": name, "text": text} for name, text in texts.items()]
    return benchmark.score(items, benchmark.pair(items, rows), variant, judge)


def by_id(scores: Scores) -> dict[str, tuple[float | None, Any]]:
    """(score, parsed) of every item."""
    return {row.item_id: (row.score, row.parsed) for row in scores.per_item}
