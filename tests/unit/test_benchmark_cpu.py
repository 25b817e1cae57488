"""The comparison on a CPU, at tiny size: both sides train the same samples, and what was measured is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.cpu import Case, draw, measure, write


@pytest.mark.parametrize("stage", [1, 2])
def test_both_sides_train_and_are_compared(stage: int, tmp_path: Path) -> None:
    cases = [Case(side, stage, 320, "tiny", 1) for side in ("llava", "ours", "ours_cached")]
    found = {case: [measure(case)] for case in cases}
    for rows in found.values():
        # Random models know nothing: about the logarithm of the vocabulary, whoever computes it.
        assert abs(rows[0]["loss"] - math.log(320)) < 0.2
    write(found | {Case("llava_unchecked", stage, 320, "tiny", 1): []}, "tiny", tmp_path / "cpu.json")
    written = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["side"] for row in written] == ["llava", "ours", "ours_cached"]
    for row, case in zip(written, cases, strict=True):
        own, other = found[case][0], found[cases[0]][0]
        assert row["samples_per_s_ratio"] == pytest.approx(own["samples_per_s"] / other["samples_per_s"])
        assert row["peak_mib_ratio"] == pytest.approx(own["peak_mib"] / other["peak_mib"])
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_samples_are_those_of_the_two_stages() -> None:
    captions, turns = draw(1, 24, 500), draw(2, 24, 500)
    assert all(ids == labels and image and 20 <= len(ids) < 60 for ids, labels, image in captions)
    assert [image for *_, image in turns].count(False) == 2
    for ids, labels, _ in turns:
        assert 40 <= len(ids) <= 500 and labels[: int(len(ids) * 0.8)] == [-100] * int(len(ids) * 0.8)
