"""Runs one stage as one of several ranks (`python -m tinylmm.launch.worker WORK_FOLDER`).

A rank reads job.json from the work folder and nothing else. How it ended stands in `result.json`: the summary, or the error
with its exit code, so that the parent can tell a user's fault from ours.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tinylmm.errors import DiskError, StoppedError, TinyLMMError, printable
from tinylmm.stages import import_body
from tinylmm.stages.job import StageJob, read_job
from tinylmm.stop import belong_to, claimed, watch_for_stop
from tinylmm.store.disk import refusal
from tinylmm.store.provenance import peak_rss_mib

log = logging.getLogger(__name__)

AGENT_PID = "TINYLMM_AGENT_PID"
"""Environment variable with the process that a rank belongs to; by default its parent."""
RESULT_FILE = "result.json"
RANK_RESULTS = "result-rank*.json"
"""Of other ranks than 0, which leave one only when they fail."""
FAILED_RANKS = "failed-ranks"
"""Folder in which each machine's agent leaves a list of `FailedRank`."""
WORDS_FOLDER = "rank-words"
"""What each rank wrote to its stderr, as torchrun lays it out."""


@dataclass(frozen=True)
class FailedRank:
    """How a rank ended: its exit code (negative: the signal that ended it), and the second in which that was seen.

    Attributes:
        words: what it wrote to its stderr, a file below the stage's folder.
    """

    rank: int
    exit_code: int
    time: int
    words: str


def quiet_libraries() -> None:
    """Leave the terminal to our own progress: no bars from transformers and datasets, no banner from DeepSpeed."""
    if not has_gpu_driver():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_warning()
    datasets.disable_progress_bars()


class ShownFormatter(logging.Formatter):
    """Lines that a terminal shows and does not obey: logs quote ids and paths of the data, and people `tail` them."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter`, with escape codes written out."""
        return printable(super().format(record))


def has_gpu_driver() -> bool:
    """Whether this machine has NVIDIA's driver, found out without loading torch."""
    return Path("/dev/nvidiactl").exists()


def main() -> NoReturn:
    """Entry point of a rank."""
    folder = Path(sys.argv[1])
    belong_to(int(os.environ.get(AGENT_PID, os.getppid())))
    faulthandler.enable()  # what dies in C code says where
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter(f"%(asctime)s rank {rank} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler])
    job = read_job(folder)
    _take_share(job)
    result: dict[str, Any]
    code = 0
    with watch_for_stop(folder), claimed(job.require_claim):
        try:
            _join_ranks(job)
            quiet_libraries()
            run = import_body(job.kind)
            gc.freeze()  # libraries live as long as this process: a collection between two steps passes them over
            result = {"summary": run(job), "peak_rss_mib": peak_rss_mib()}
        except TinyLMMError as error:
            code = error.exit_code
            result = {"error": str(error), "type": type(error).__name__, "exit_code": code, "rank": rank}
        except KeyboardInterrupt:  # asked to stop where nothing had to be saved
            code = StoppedError.exit_code
            said = f"interrupted during {job.kind} {job.name}; the same command continues"
            result = {"error": said, "type": StoppedError.__name__, "exit_code": code, "rank": rank}
        except Exception as error:
            code = 1
            full = refusal(error, folder)
            kind, text = ("traceback", traceback.format_exc()) if full is None else (DiskError.__name__, full)
            result = {"error": text, "type": kind, "exit_code": code, "rank": rank}
            log.exception("rank %d failed", rank)
    if rank == 0 or code:
        # The first rank to fail says why; later ones only follow.
        path = folder / (RESULT_FILE if rank == 0 else RANK_RESULTS.replace("*", str(rank)))
        path.write_text(json.dumps(result), encoding="utf-8")
    _leave_ranks(code)


def _take_share(job: StageJob[Any]) -> None:
    threads = job.share.take(int(os.environ.get("WORLD_SIZE", "1")))
    if threads is not None and "torch" in sys.modules:  # of a starter: its OpenMP has read the environment already
        sys.modules["torch"].set_num_threads(threads)


def _join_ranks(job: StageJob[Any]) -> None:
    """Create the process group with our own timeout: transformers drops its `ddp_timeout` on CPUs and in DeepSpeed."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    from datetime import timedelta

    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=job.settings.launch.start_timeout_s))


def _leave_ranks(code: int) -> NoReturn:
    """End this rank without C++ destructors: gloo's threads, still alive then, make some of them abort."""
    if code == 0:  # a stop may have come while torch was being imported, which cannot be done a second time
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # rank 0 hosts the store that the others talk to until they are done
            distributed.destroy_process_group()
    logging.shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    main()
