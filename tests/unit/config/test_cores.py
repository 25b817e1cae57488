"""How many cores are ours: of the machine's, and of a container's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinylmm.config.cores import usable_cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("max 100000", 8),
        ("900000 100000", 8),
        (None, 8),
    ],
)
def test_a_containers_quota_counts_where_it_is_less_than_the_machine(
    quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores(tmp_path / "cpu.max") == expected
