"""Runs a stage on several ranks of this machine under torchrun; DeepSpeed, where asked for, starts inside the ranks."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from typing import Any

from tinylmm.config.spec import LaunchSpec
from tinylmm.errors import StageFailedError, StoppedError, TinyLMMError, UserError
from tinylmm.launch.worker import RANK_RESULTS, RESULT_FILE, has_gpu_driver
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE
from tinylmm.store.layout import LOG_FILE

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 20


class RankError(TinyLMMError):
    """An error of our family raised in a rank, carried to the parent with its message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Backend:
    """See `LaunchBackend`: a torchrun of this machine, in a session of its own."""

    def __init__(self, launch: LaunchSpec) -> None:
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        """Where this try's part of the log begins."""

    def start(self, job: StageJob[Any]) -> None:
        """Start torchrun on the job."""
        self._job = job
        _refuse_more_ranks_than_gpus(self._launch)
        for stale in [job.folder / STOP_FILE, job.folder / RESULT_FILE, *job.folder.glob(RANK_RESULTS)]:
            stale.unlink(missing_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={self._launch.nproc}", "--module", "tinylmm.launch.worker", str(job.folder)]
        with (job.folder / LOG_FILE).open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=_environment(self._launch),
                start_new_session=True,  # Ctrl-C reaches this parent alone, which then asks the ranks to save
            )

    def poll(self) -> dict[str, Any] | None:
        """Return the summary that rank 0 left, None while ranks work.

        Raises:
            StoppedError: ranks saved and stopped because they were asked to.
            RankError, UserError: a rank raised an error of ours; message and exit code are its own.
            StageFailedError: a rank died or hung; names the rank, with the last lines of the log.
        """
        assert self._process is not None, "poll() comes after start()"
        if self._process.poll() is None:
            return None
        return _outcome(self._job, self._process.returncode, self._log_start)

    def stop(self, now: bool = False) -> None:
        """Leave the ranks the file that asks them to stop, or kill them."""
        if self._process is None or self._process.poll() is not None:
            return
        if now:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        else:
            (self._job.folder / STOP_FILE).touch()


def _refuse_more_ranks_than_gpus(launch: LaunchSpec) -> None:
    """Say before anything starts what NCCL would say after half a minute as an invalid device ordinal.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    if launch.device == "cpu" or not has_gpu_driver():
        return
    import torch

    found = torch.cuda.device_count()
    if 0 < found < launch.nproc:
        raise UserError(
            f"launch.nproc is {launch.nproc}, but only {found} CUDA GPUs can be seen, and each rank needs its own. "
            f"Set launch.nproc={found}, or launch.device=cpu."
        )


def _environment(launch: LaunchSpec) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if launch.device == "cpu" or not has_gpu_driver():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _first_failure(text: str) -> tuple[int, int] | None:
    """(rank, exit code) of the rank that brought this try down, as torchrun's agent wrote it into the log.

    A rank killed by a signal comes before those that failed over its silence, and before those that the agent then ended.
    """
    found = [(int(r), int(c)) for r, c in re.findall(r"rank\s+: (\d+).*?exitcode\s+: (-?\d+)", text, re.DOTALL)]
    killed = [failure for failure in found if failure[1] < 0 and failure[1] != -signal.SIGTERM]
    return next(iter(killed or found[-1:]), None)


def _outcome(job: StageJob[Any], code: int, begin: int = 0) -> dict[str, Any]:
    """What the ranks left: the summary, or the error of the rank that is to blame. `begin` is where this try's log starts."""
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in [job.folder / RESULT_FILE, *sorted(job.folder.glob(RANK_RESULTS))]
        if path.exists()
    ]
    errors = [result for result in results if "error" in result]
    # A rank's own fault comes before what it made of the others (closed connections, timeouts).
    for error in errors:
        if error["type"] == StoppedError.__name__:
            raise StoppedError(error["error"])
        if error["exit_code"] == UserError.exit_code:
            raise UserError(error["error"])
        if error["type"] != "traceback":
            raise RankError(f"rank {error['rank']}: {error['error']}", error["exit_code"])
    if code == 0 and not errors and results:
        return dict(results[0]["summary"])
    path = job.folder / LOG_FILE
    text = path.read_bytes()[begin:].decode(errors="replace")
    first = _first_failure(text)
    if errors and (first is None or first[0] in [error["rank"] for error in errors]):
        raise StageFailedError(f"rank {errors[0]['rank']} failed:\n{errors[0]['error']}")
    if first is not None:
        why = " (killed from outside, hung, or out of memory)" if first[1] == -signal.SIGKILL else ""
        others = "".join(f"\n  rank {e['rank']} then said: {e['error'].strip().splitlines()[-1]}" for e in errors)
        raise StageFailedError(
            f"rank {first[0]} ended with exit code {first[1]} and did not say why{why}. The log is {path}.{others}"
        )
    last = "\n".join(f"  {line}" for line in text.splitlines()[-LOG_TAIL_LINES:])
    raise StageFailedError(f"torchrun ended with exit code {code} and no rank said why. Last lines of {path}:\n{last}")
