"""`python -m benchmarks.scaling` at tiny size, and the exponents that it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling


@pytest.mark.parametrize("axis", scaling.AXES)
def test_a_point_of_every_axis_is_measured(axis: str) -> None:
    found = scaling.measure(axis, scaling.AXES[axis].tiny[-1], tiny=True)
    assert set(found) == {"cpu_s", "wall_s", "peak_mib"} and found["cpu_s"] > 0 and found["wall_s"] > 0


def test_results_and_plot_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scaling, "_in_process", lambda axis, size, tiny: {"cpu_s": 1e-4 * size**2, "wall_s": 1.0, "peak_mib": 0.0}
    )
    out = tmp_path / "scaling.json"
    assert scaling.main(["--tiny", "--axes", "data,length", "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record["axes"]) == ["length", "data"]
    length = record["axes"]["length"]
    assert length["fixed"] == {"batch": 1, "vocabulary": 8192, "images": 0}
    assert length["exponents"]["cpu_s"] == pytest.approx(2) and length["exponents"]["peak_mib"] is None
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_points_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    assert scaling.main(["--tiny", "--axes", "vocabulary", "--out", str(out)]) == 0
    points = json.loads(out.read_text(encoding="utf-8"))["axes"]["vocabulary"]["points"]
    assert [point["size"] for point in points] == list(scaling.AXES["vocabulary"].tiny)


def test_the_exponent_is_that_of_the_largest_points() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert scaling.exponent(sizes, [9, 9, 4, 8, 16]) == pytest.approx(1)
    assert scaling.exponent(sizes, [5, 5, 7, 7, 7]) == pytest.approx(0)
