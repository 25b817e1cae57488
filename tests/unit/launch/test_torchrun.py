"""torchrun is started on what can run, and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StageFailedError, UserError
from tinylmm.launch.backends.torchrun import Backend, _outcome
from tinylmm.launch.nodes import _environment
from tinylmm.launch.worker import FAILED_RANKS, WORDS_FOLDER
from tinylmm.stages.job import make_job

DATA = {"build": {"_target_": "x", "seed": 0, "options": {}}}


def starts(folder: Path, gpus: int, **launch: str) -> bool:
    """Whether a process is started for two ranks on a machine with so many GPUs."""
    spec = LaunchSpec.model_validate({"backend": "torchrun", "nproc": 2, **launch})
    job = make_job("data", "x", "0" * 64, DATA, {}, {}, folder, folder)
    with (
        mock.patch("tinylmm.launch.nodes.has_gpu_driver", return_value=gpus > 0),
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


@pytest.mark.parametrize(("ours", "threads"), [(6, "3"), (1, "1")])
def test_ranks_share_the_cores_that_are_ours_not_the_machines(
    ours: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("tinylmm.launch.nodes.usable_cores", lambda: ours)
    assert _environment(LaunchSpec(backend="torchrun", nproc=2))["OMP_NUM_THREADS"] == threads


def blamed(folder: Path, failed: list[tuple[int, int, int]], errors: dict[int, str], words: dict[int, str]) -> str:
    """What is said of ranks that failed as (rank, exit code, second), left these tracebacks, and wrote these lines."""
    job = make_job("data", "x", "0" * 64, DATA, {}, {}, folder, folder)
    (folder / "log.txt").write_text("the agent's own lines")
    (folder / FAILED_RANKS).mkdir()
    for rank, code, second in failed:  # each on a machine of its own
        path = folder / WORDS_FOLDER / f"none_{rank}/attempt_0/0/stderr.log"
        record = {"rank": rank, "exit_code": code, "time": second, "words": str(path)}
        (folder / FAILED_RANKS / f"host-{rank}.json").write_text(json.dumps([record]))
    for rank, error in errors.items():
        result = {"error": error, "type": "traceback", "exit_code": 1, "rank": rank}
        (folder / ("result.json" if rank == 0 else f"result-rank{rank}.json")).write_text(json.dumps(result))
    for rank, text in words.items():
        path = folder / WORDS_FOLDER / f"none_{rank}/attempt_0/0/stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(StageFailedError) as raised:
        _outcome(job, 1)
    return str(raised.value)


def test_a_rank_that_fails_is_shown_in_its_own_words_though_the_agent_then_kills_another(tmp_path: Path) -> None:
    said = blamed(tmp_path, [(0, -9, 130), (1, 1, 100)], {1: "AcceleratorError: invalid device ordinal"}, {})
    assert said.startswith("rank 1 failed:\nAcceleratorError: invalid device ordinal")
    assert said.endswith("rank 0 did not end by itself then and was killed")


def test_a_rank_that_dies_without_a_traceback_is_shown_by_what_it_wrote_last(tmp_path: Path) -> None:
    said = blamed(tmp_path, [(0, 1, 100), (1, -6, 100)], {0: "peer gone"}, {1: "terminate called: bad_alloc", 0: "x"})
    assert said.startswith("rank 1 ended with exit code -6 (SIGABRT).")
    assert "Its last lines:\n  terminate called: bad_alloc" in said
    assert said.endswith("rank 0 then said: peer gone")


def test_a_rank_that_was_killed_comes_before_those_that_failed_over_its_silence(tmp_path: Path) -> None:
    said = blamed(tmp_path, [(0, 1, 100), (1, -9, 100)], {0: "Connection closed by peer"}, {})
    assert said.startswith("rank 1 ended with exit code -9 (SIGKILL: killed from outside, or by the kernel")
    assert said.endswith("rank 0 then said: Connection closed by peer")
