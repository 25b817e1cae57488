"""Starts stages in processes of their own (`python -m tinylmm.launch.starter PARENT_PID fork|anew|try`).

torch and transformers take many seconds to load, and a short stage would wait for little else: `fork` makes copies of this
process, which has all loaded and done nothing with it. A stage's process is a copy for that stage alone, as good as a new one.
A copy of a process that has started CUDA cannot use a GPU: with `anew` nothing is loaded here, and each stage's process loads
what it needs; with `try` it is found out whether copies can use a GPU, and torchrun's ranks are copies only then.

Orders come as JSON lines on stdin: {"start": FOLDER, "folder": working folder, "environment": {...}}, with "torchrun": [WORDS]
where that is to be started and not the stage's worker, and {"signal": NUMBER, "pid": PID, "whom": "it"|"children"|"session"}.
Answers go to stdout: {"started": FOLDER, "pid": PID} and {"ended": PID, "code": exit code, or minus the signal}.
Only this process reaps, so a signal that it sends never meets a stranger under a number used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from tinylmm.launch.forked import end_after
from tinylmm.launch.worker import AGENT_PID, quiet_libraries
from tinylmm.launch.worker import main as work
from tinylmm.planning.kinds import KINDS
from tinylmm.stages import import_body
from tinylmm.stop import belong_to
from tinylmm.store.layout import LOG_FILE

LOG_MODE = os.O_WRONLY | os.O_CREAT | os.O_APPEND
POLL_SECONDS = 0.02
"""How often it is looked whether a stage has ended."""
TORCHRUN = "torch.distributed.run"
WITHOUT_CUDA = ("datasets", "accelerate", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
"""What takes long to load and leaves CUDA alone. bitsandbytes, which all the rest loads where it is installed, starts CUDA."""


def main() -> None:
    """Entry point: serve until whoever started this closes stdin, or is gone."""
    belong_to(int(sys.argv[1]))
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints while it is loaded is no answer
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # and none is left for copies to print again
    anew = not _load(sys.argv[2])
    children: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS if children else None)[0]:
            found = os.read(0, 1 << 16)
            if not found:
                break
            *lines, rest = (rest + found).split(b"\n")
            for line in lines:
                _obey(json.loads(line), children, answers, anew)
        _reap(children, answers)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def _load(how: str) -> bool:
    """Load what stages need; returns whether copies of this process can do the work of one."""
    if how == "anew":
        return False
    if how == "try":
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is found out without CUDA
    quiet_libraries()
    if how == "try" and find_spec("bitsandbytes") is not None:
        for name in WITHOUT_CUDA:
            import_module(name)
    else:
        for kind in KINDS:
            import_body(kind)
    return how == "fork" or _copies_can_use_cuda()


def _copies_can_use_cuda() -> bool:
    """Try it in a copy."""
    pid = os.fork()
    if not pid:
        end_after(_begin_cuda)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _begin_cuda() -> None:
    from torch import cuda

    sys.exit(1 if cuda._is_in_bad_fork() else min(ctypes.CDLL("libcuda.so.1").cuInit(0), 1))


def _obey(order: dict[str, Any], children: set[int], answers: int, anew: bool) -> None:
    if "start" in order:
        parent = os.getpid()
        if "torchrun" in order:
            import_module(TORCHRUN)  # once, for all copies
        pid = os.fork()
        if not pid:
            os.close(answers)
            end_after(lambda: _become(order, parent, anew))
        children.add(pid)
        _answer(answers, {"started": order["start"], "pid": pid})
    elif order["pid"] in children:
        _signal(order["pid"], order["signal"], order["whom"])


def _signal(pid: int, number: int, whom: str) -> None:
    if whom == "session":
        os.killpg(pid, number)
    elif whom == "it":
        os.kill(pid, number)
    else:
        with contextlib.suppress(psutil.NoSuchProcess):  # they are ending as it is
            for child in psutil.Process(pid).children():
                child.send_signal(number)


def _reap(children: set[int], answers: int) -> None:
    for pid in sorted(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.discard(pid)
            _answer(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, record: dict[str, Any]) -> None:
    os.write(answers, json.dumps(record).encode() + b"\n")


def _become(order: dict[str, Any], parent: int, anew: bool) -> None:
    """In the fork: a process as if started by the command itself, which writes to the stage's log."""
    os.setsid()  # its helpers end with it
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"], **{AGENT_PID: str(parent)})
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(Path(order["start"]) / LOG_FILE, LOG_MODE, 0o666)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    if "torchrun" in order:
        from tinylmm.launch.agent import supervise

        supervise(parent, Path(order["start"]), order["torchrun"], copies=not anew)
    elif anew:
        os.execv(sys.executable, [sys.executable, "-m", "tinylmm.launch.worker", order["start"]])
    else:
        sys.argv = ["worker", order["start"]]
        work()


if __name__ == "__main__":
    main()
