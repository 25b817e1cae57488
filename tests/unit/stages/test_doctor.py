"""Doctor says what there is, and why what is not there is not; calibration measures the real machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tinylmm.sizing.cards import read_calibration
from tinylmm.stages import calibrate, doctor


def test_what_is_found_is_plain_json_with_a_reason_for_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    found = doctor.examine(tmp_path / "store")
    assert json.loads(json.dumps(found)) == found
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    )
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory"] > 2**28
    assert all(path["why"] for path in found["fast_paths"])
    assert all(path["fix"] in found["faster"] for path in found["fast_paths"] if path["fix"] and not path["active"])
    assert list(tmp_path.iterdir()) == [], "it writes nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_each_path_that_needs_one_says_so(tmp_path: Path) -> None:
    paths = {path.name: path for path in doctor.fast_paths()}
    assert not paths["GPU"].active and not paths["flash-attn"].active
    assert paths["flash-attn"].why == "needs a GPU"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    path = next(path for path in doctor.fast_paths() if "qlora" in path.name)
    assert (path.active, path.fix) == (False, "pip install 'tinylmm[qlora]' for bitsandbytes")


def test_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "shared_memory_bytes", lambda: 2**26)
    path = next(path for path in doctor.fast_paths() if "shared memory" in path.name)
    assert not path.active and "--shm-size" in path.fix


def test_calibration_measures_and_keeps_what_plans_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "SECONDS", 0.05)
    monkeypatch.setattr(calibrate, "SIZES", {"cpu": (64, 2**12), "cuda": (64, 2**12)})
    path = calibrate.calibrate_and_keep()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    measured = read_calibration(device)
    assert path.parent == tmp_path / "tinylmm" and measured is not None
    assert min(measured.matmul_flops, measured.copy_bytes, measured.images_per_s) > 0
