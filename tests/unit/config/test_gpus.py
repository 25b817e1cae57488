"""`launch.nproc=auto` is one rank a GPU that can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinylmm.config import gpus
from tinylmm.config.gpus import CPU_RANKS, visible_gpus
from tinylmm.config.launch import LaunchSpec


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A /dev with four GPUs."""
    for name in ("nvidiactl", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_all_devices_count_unless_some_are_chosen(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert visible_gpus({}, machine) == 4
    for chosen, count in (("0", 1), ("2,3", 2), ("", 0), ("-1", 0), ("MIG-1a,MIG-2b,MIG-3c", 3)):
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}, machine) == count
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path_factory.mktemp("dev")) == 0, "there is no driver"


@pytest.mark.parametrize(("found", "device", "ranks"), [(4, "auto", 4), (1, "cuda", 1), (4, "cpu", 2), (0, "auto", 2)])
def test_auto_is_a_rank_a_gpu(found: int, device: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPU_RANKS == 2
    monkeypatch.setattr(gpus, "visible_gpus", lambda: found)
    launch = LaunchSpec.model_validate({"backend": "torchrun", "nproc": "auto", "device": device})
    assert launch.nproc == ranks
