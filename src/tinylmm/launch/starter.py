"""Starts stages in processes of their own (`python -m tinylmm.launch.starter PARENT_PID fork|anew`).

torch and transformers take seconds to load, and a short stage would wait for little else: `fork` makes copies of this process,
which has all loaded. Where there is a GPU, a copy of a process that has looked for it cannot use it: there each stage starts
`anew`, and takes longer than its imports. Orders come as JSON lines on stdin: {"start": FOLDER, "folder": working folder,
"environment": {...}} and {"signal": NUMBER, "pid": PID, "all": whether its whole session}. Answers go to stdout:
{"started": FOLDER, "pid": PID} and {"ended": PID, "code": exit code, or minus the signal}.
Only this process reaps, so a signal that it sends never meets a stranger under a number used again.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tinylmm.launch.worker import AGENT_PID, quiet_libraries
from tinylmm.launch.worker import main as work
from tinylmm.planning.kinds import KINDS
from tinylmm.stages import import_body
from tinylmm.stop import belong_to
from tinylmm.store.layout import LOG_FILE

LOG_MODE = os.O_WRONLY | os.O_CREAT | os.O_APPEND
POLL_SECONDS = 0.02
"""How often it is looked whether a stage has ended."""


def main() -> None:
    """Entry point: serve until whoever started this closes stdin, or is gone."""
    belong_to(int(sys.argv[1]))
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints while it is loaded is no answer
    anew = sys.argv[2] == "anew"
    if not anew:
        quiet_libraries()
        for kind in KINDS:
            import_body(kind)
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


def _obey(order: dict[str, Any], children: set[int], answers: int, anew: bool) -> None:
    if "start" in order:
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            os.close(answers)
            _become_worker(order, parent, anew)
        children.add(pid)
        _answer(answers, {"started": order["start"], "pid": pid})
    elif order["pid"] in children:
        (os.killpg if order["all"] else os.kill)(order["pid"], order["signal"])


def _reap(children: set[int], answers: int) -> None:
    for pid in sorted(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.discard(pid)
            _answer(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, record: dict[str, Any]) -> None:
    os.write(answers, json.dumps(record).encode() + b"\n")


def _become_worker(order: dict[str, Any], parent: int, anew: bool) -> NoReturn:
    """In the fork: a process as if started by the command itself, which writes to the stage's log."""
    try:
        os.setsid()  # its helpers end with it
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"], **{AGENT_PID: str(parent)})
        nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(Path(order["start"]) / LOG_FILE, LOG_MODE, 0o666)
        for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        if anew:
            os.execv(sys.executable, [sys.executable, "-m", "tinylmm.launch.worker", order["start"]])
        sys.argv = ["worker", order["start"]]
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
