"""torchrun as part of a run: its own agent, in a copy of the starter (`launch/starter.py`), which has all loaded.

It dies with whoever started it, and its ranks with it; it leaves signals to them, as torchrun would answer to one by ending
its ranks within half a minute, saved or not. Which ranks failed, and how, it notes in `failed-ranks/`. Of a stage on several
machines each has an agent, which waits for those of the others. An agent and its ranks serve one stage and no other.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from tinylmm.errors import UserError
from tinylmm.launch.forked import end_after
from tinylmm.launch.worker import AGENT_PID, FAILED_RANKS, RESULT_FILE, FailedRank
from tinylmm.launch.worker import main as work
from tinylmm.stop import belong_to

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.01
"""Between two looks at a rank that is waited for."""


def supervise(parent: int, folder: Path, words: list[str], copies: bool) -> None:
    """Be torchrun for the stage in `folder`, until its ranks have ended.

    Args:
        parent: process id of whoever started this process.
        words: for torchrun.
        copies: whether ranks are copies of this process, which has loaded what they need, or load it themselves.
    """
    belong_to(parent)
    os.environ[AGENT_PID] = str(os.getpid())
    if copies:
        _fork_ranks(int(next(word.split("=")[1] for word in words if word.startswith("--nproc-per-node="))))
    else:
        log.warning(
            "each rank loads the libraries itself: copies of a process that has loaded them could not use a GPU"
        )
    try:
        # torchrun's own handlers would end ranks that are saving; none of its signals ever comes.
        torchrun.main(["--signals-to-handle=SIGRTMAX", *words])
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


class _Copy:
    """A rank that is a copy of this process: what torchrun needs of `subprocess.Popen`.

    It is made before torchrun starts any thread, as a copy has but one; and waits for torchrun to say which rank it is.
    """

    def __init__(self, others: list[_Copy]) -> None:
        self.returncode: int | None = None
        parent, (told, self._tell) = os.getpid(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            for one in (self, *others):  # else none of them sees the agent's end
                os.close(one._tell)
            end_after(lambda: self._become_rank(parent, told))
        os.close(told)

    def begin(self, arguments: Sequence[str], environment: dict[str, str], outputs: dict[int, str]) -> None:
        """Have it do what a new process would that was started so. `outputs` are files, by descriptor."""
        order = {"arguments": [*arguments], "environment": environment, "outputs": [*outputs.items()]}
        with os.fdopen(self._tell, "wb") as pipe:
            pipe.write(json.dumps(order).encode())

    def _become_rank(self, parent: int, told: int) -> None:
        os.setsid()
        belong_to(parent)
        with os.fdopen(told, "rb") as pipe:
            said = pipe.read()
        if not said:  # ranks did not come to be
            sys.exit(1)
        order = json.loads(said)
        for descriptor, path in order["outputs"]:
            with open(path, "wb") as output:  # noqa: PTH123 (as torchrun's own)
                os.dup2(output.fileno(), descriptor)
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["worker", order["arguments"][-1]]
        work()

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it, None while it works."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            time.sleep(WAIT_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _fork_ranks(number: int) -> None:
    """Have torchrun take copies of this process for its ranks, where it would start new ones."""
    waiting: list[_Copy] = []
    for _ in range(number):
        waiting.append(_Copy(waiting))

    def begin(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> _Copy:
        copy = waiting.pop(0)
        files = {1: handler._stdout, 2: handler._stderr}
        copy.begin(args, env, {descriptor: file.name for descriptor, file in files.items() if file is not None})
        return copy

    SubprocessHandler._popen = begin  # type: ignore[method-assign, assignment]
