"""The benchmark of the paired test: a short run of it, and what its kept result says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import significance


def test_a_short_run_writes_its_result_and_plot(tmp_path: Path) -> None:
    out = tmp_path / "significance.json"
    significance.main(["--repetitions", "20", "--runs", "3", "--images", "30", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [row["questions_an_image"] for row in record["false_positives"]] == [1, 6, 20]
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("questions", [1, 6, 20])
def test_the_kept_result_holds_what_is_promised(questions: int) -> None:
    record = json.loads(significance.RESULT.read_text())
    (row,) = [row for row in record["false_positives"] if row["questions_an_image"] == questions]
    (gain,) = [row for row in record["found_gains"] if row["questions_an_image"] == questions]
    assert row["by_images"] <= 0.06 and gain["by_images"] > 0.3
    assert record["repetitions"] >= 2000


def test_two_seeds_are_seldom_called_different() -> None:
    record = json.loads(significance.RESULT.read_text())["a_a"]
    assert record["runs"] >= 200 and record["benchmarks"] == 12 and record["said_better"] <= 0.05
