"""torchrun is started on what can run, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from tinylmm.config.spec import LaunchSpec
from tinylmm.errors import UserError
from tinylmm.launch.backends.torchrun import Backend
from tinylmm.stages.job import make_job

DATA = {"build": {"_target_": "x", "seed": 0, "options": {}}}


def starts(folder: Path, gpus: int, **launch: str) -> bool:
    """Whether a process is started for two ranks on a machine with so many GPUs."""
    spec = LaunchSpec.model_validate({"backend": "torchrun", "nproc": 2, **launch})
    job = make_job("data", "x", "0" * 64, DATA, {}, {}, folder, folder)
    with (
        mock.patch("tinylmm.launch.backends.torchrun.has_gpu_driver", return_value=gpus > 0),
        mock.patch("torch.cuda.device_count", return_value=gpus),
        mock.patch("subprocess.Popen") as process,
    ):
        Backend(spec).start(job)
    return bool(process.called)


def test_more_ranks_than_gpus_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launch\.nproc is 2, but only 1 CUDA GPUs can be seen.*Set launch\.nproc=1"):
        starts(tmp_path, gpus=1)
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(("gpus", "launch"), [(2, {}), (0, {}), (1, {"device": "cpu"})])
def test_ranks_that_have_a_device_each_are_started(tmp_path: Path, gpus: int, launch: dict[str, str]) -> None:
    assert starts(tmp_path, gpus, **launch)
