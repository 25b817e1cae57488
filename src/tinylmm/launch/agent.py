"""torchrun as part of a run (`python -m tinylmm.launch.agent PARENT_PID WORK_FOLDER ...`, the rest as for torchrun).

It dies with whoever started it, and its ranks with it; it leaves signals to them, as torchrun would answer to one by ending
its ranks within half a minute, saved or not. Which ranks failed, and how, it notes in `failed-ranks/`. Of a stage on several
machines each has an agent, which waits for those of the others.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from tinylmm.errors import UserError
from tinylmm.launch.worker import AGENT_PID, FAILED_RANKS, RESULT_FILE, FailedRank
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
        failed = [
            FailedRank(rank, one.exitcode, one.timestamp, str(Path(one.error_file).with_name("stderr.log")))
            for rank, one in error.failures.items()
        ]
        (folder / FAILED_RANKS).mkdir(exist_ok=True)
        own = folder / FAILED_RANKS / f"{socket.gethostname()}-{os.getpid()}.json"
        own.write_text(json.dumps([asdict(one) for one in failed]), encoding="utf-8")
        log.error("%s", error)
        sys.exit(1)
    except RendezvousTimeoutError:
        _refuse(
            folder,
            "launch.nodes: not all machines came within launch.start_timeout_s. Give the same command on every one of them "
            "at about the same time, with the store on a disk that they share; or set launch.nodes=1.",
        )
    except RendezvousConnectionError:
        _refuse(
            folder,
            "launch.nodes: the machines cannot reach each other where they were to meet. Set launch.rendezvous=HOST:PORT to a "
            "name and an open port of one of them that all others reach.",
        )


def _refuse(folder: Path, said: str) -> NoReturn:
    """Leave an error as a rank would, and end."""
    result = {"error": said, "type": UserError.__name__, "exit_code": UserError.exit_code, "rank": 0}
    (folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    sys.exit(1)


if __name__ == "__main__":
    main()
