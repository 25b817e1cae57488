"""Runs a stage on several ranks of this machine under torchrun; DeepSpeed, where asked for, starts inside the ranks."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tinylmm.errors import StageFailedError, StoppedError, TinyLMMError, UserError
from tinylmm.launch.worker import RESULT_FILE
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE, stop_requested

log = logging.getLogger(__name__)

LOG_FILE = "log.txt"
LOG_TAIL_LINES = 20
POLL_SECONDS = 0.1


class RankError(TinyLMMError):
    """An error of our family raised in a rank, carried to the parent with its message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_ranks(job: StageJob) -> dict[str, Any]:
    """Start torchrun on `job`, wait for it, and return the summary that rank 0 left.

    Raises:
        StoppedError: ranks saved and stopped because this process was asked to.
        RankError, UserError: a rank raised an error of ours; message and exit code are its own.
        StageFailedError: a rank died or hung; names the rank, with the last lines of the log.
    """
    for stale in [job.folder / STOP_FILE, job.folder / RESULT_FILE, *job.folder.glob("result-rank*.json")]:
        stale.unlink(missing_ok=True)
    launch = job.settings["launch"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch['nproc']}"]
    command += ["--module", "tinylmm.launch.worker", str(job.folder)]
    with (job.folder / LOG_FILE).open("ab") as output:
        begin = output.tell()
        process = (
            subprocess.Popen(  # its own session: Ctrl-C reaches this parent alone, which then asks the ranks to save
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=_environment(launch),
                start_new_session=True,
            )
        )
    try:
        while process.poll() is None:
            if stop_requested() and not (job.folder / STOP_FILE).exists():
                (job.folder / STOP_FILE).touch()
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _outcome(job, process.returncode, begin)


def _environment(launch: dict[str, Any]) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch["nproc"])))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if launch["device"] == "cpu" or not Path("/dev/nvidiactl").exists():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _first_failure(text: str) -> tuple[int, int] | None:
    """(rank, exit code) of the rank that brought this try down, as torchrun's agent wrote it into the log.

    A rank killed by a signal comes before those that failed over its silence, and before those that the agent then ended.
    """
    found = [(int(r), int(c)) for r, c in re.findall(r"rank\s+: (\d+).*?exitcode\s+: (-?\d+)", text, re.DOTALL)]
    killed = [failure for failure in found if failure[1] < 0 and failure[1] != -signal.SIGTERM]
    return next(iter(killed or found[-1:]), None)


def _outcome(job: StageJob, code: int, begin: int = 0) -> dict[str, Any]:
    """What the ranks left: the summary, or the error of the rank that is to blame. `begin` is where this try's log starts."""
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in [job.folder / RESULT_FILE, *sorted(job.folder.glob("result-rank*.json"))]
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
