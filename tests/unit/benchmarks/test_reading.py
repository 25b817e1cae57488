"""`python -m benchmarks.reading` compares what it reads, and measures every transform."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import reading
from tinylmm.stages.kept import ThroughShelf


def test_every_transform_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "reading.json"
    assert reading.main(["--images", "2", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["transform"] for row in rows] == list(reading.TRANSFORMS)
    assert all(row["bit_equal"] and row["jpeg_per_s"] > 0 and row["cache_per_s"] > 0 for row in rows)
    assert 3 * 336**2 / 1e3 < rows[0]["kb_an_image"] < 3 * 336**2 / 1e3 + 1


def test_pixels_that_differ_end_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ThroughShelf.__call__
    monkeypatch.setattr(ThroughShelf, "__call__", lambda self, name: read(self, name) // 2)
    with pytest.raises(RuntimeError, match="others than the file's"):
        reading.main(["--images", "1", "--rounds", "1", "--out", str(tmp_path / "reading.json")])
