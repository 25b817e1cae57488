"""Runs each test in an empty folder of its own, as an installed command would be, without the user's environment."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TINYLMM_STORE", "TINYLMM_DATA"):
        monkeypatch.delenv(name, raising=False)
