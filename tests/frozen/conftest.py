"""Runs each test in an empty folder of its own, without the user's environment: what is frozen depends on neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frozen import product


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    product.freeze_versions(monkeypatch.setitem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # rows of a measured machine have a field more
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # with a GPU, evaluations are in bf16 where nothing else is said
    for name in ("TINYLMM_STORE", "TINYLMM_DATA"):
        monkeypatch.delenv(name, raising=False)
