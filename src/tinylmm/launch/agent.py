"""torchrun as part of a run (`python -m tinylmm.launch.agent PARENT_PID WORK_FOLDER ...`, the rest as for torchrun).

It dies with whoever started it, and its ranks with it; it leaves signals to them, as torchrun would answer to one by ending
its ranks within half a minute, saved or not. Which ranks failed, and how, it notes in `failed-ranks.json`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tinylmm.launch.worker import AGENT_PID, FAILED_RANKS, FailedRank
from tinylmm.stop import belong_to

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point."""
    belong_to(int(sys.argv[1]))
    folder = Path(sys.argv[2])
    os.environ[AGENT_PID] = str(os.getpid())
    try:
        # torchrun's own handlers would end ranks that are saving; none of its signals ever comes.
        torchrun.main(["--signals-to-handle=SIGRTMAX", *sys.argv[3:]])
    except ChildFailedError as error:
        failed = [FailedRank(rank, one.exitcode, one.timestamp) for rank, one in error.failures.items()]
        (folder / FAILED_RANKS).write_text(json.dumps([asdict(one) for one in failed]), encoding="utf-8")
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
