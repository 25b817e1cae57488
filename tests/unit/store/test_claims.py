"""One live process at a time works on a stage; a dead or silent owner is taken over, a live one never."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tinylmm.errors import ClaimLostError, StoppedError
from tinylmm.stop import claimed, stop_requested, watch_for_stop
from tinylmm.store.claims import Claim, Owner, claim, held, require_claim
from tinylmm.store.integrity import write_atomic
from tinylmm.store.provenance import this_process
from tinylmm.training.metrics import MetricsFile

KEY = "train-0123456789abcdef"

HOLD = """
import sys
from pathlib import Path
from tinylmm.store.claims import claim
with claim(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""

WORK = """
import os, sys
from pathlib import Path
from tinylmm.store.claims import claim
root = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    with claim(root, f"data-{number:016x}"):
        if not (root / f"done-{number}").exists():
            os.close(os.open(root / f"inside-{number}", os.O_CREAT | os.O_EXCL))
            with (root / f"work-{number}").open("a") as file:
                file.write("worked\\n")
            (root / f"inside-{number}").unlink()
            (root / f"done-{number}").touch()
"""


def start(code: str, *arguments: Path | str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("held", "ready")
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim until it reads a line."""
    process = start(HOLD, tmp_path, KEY)
    yield process
    process.kill()
    process.communicate()


def write_owner(root: Path, silent_seconds: float = 0, **changes: Any) -> Path:
    path = root / "claims" / f"{KEY}.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps({**vars(this_process()), "since": "2026-01-01T00:00:00+00:00", "token": "theirs", **changes})
    )
    os.utime(path, (time.time() - silent_seconds,) * 2)
    return path


def test_nothing_is_held_and_nothing_made_before_the_first_claim(tmp_path: Path) -> None:
    assert held(tmp_path / "store", KEY) is None
    assert not (tmp_path / "store").exists()


def test_a_claim_names_its_owner_while_it_is_held(tmp_path: Path) -> None:
    with claim(tmp_path, KEY) as mine:
        owner = held(tmp_path, KEY)
        assert owner is not None
        assert vars(this_process()).items() <= vars(owner).items()
        require_claim(tmp_path, KEY, mine.token)
    assert held(tmp_path, KEY) is None


def test_a_claim_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path, KEY):
        raise ZeroDivisionError
    assert held(tmp_path, KEY) is None


def test_claims_on_different_stages_do_not_meet(tmp_path: Path) -> None:
    with claim(tmp_path, KEY), claim(tmp_path, "eval-0123456789abcdef"):
        assert held(tmp_path, KEY) is not None


def test_four_processes_do_each_of_25_stages_once_and_never_together(tmp_path: Path) -> None:
    workers = [start(WORK, tmp_path) for _ in range(4)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=60)
        assert worker.returncode == 0
    assert [(tmp_path / f"work-{number}").read_text() for number in range(25)] == ["worked\n"] * 25
    assert list((tmp_path / "claims").glob("*.json")) == []


def test_a_second_claim_waits_for_a_live_owner_and_says_so_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    told: list[Owner] = []

    def on_wait(owner: Owner) -> None:
        told.append(owner)
        assert holder.stdin is not None
        holder.stdin.write("release\n")
        holder.stdin.flush()

    with claim(tmp_path, KEY, on_wait):
        assert holder.wait(timeout=10) == 0
    assert [owner.pid for owner in told] == [holder.pid]


def test_whoever_waits_for_a_claim_can_be_stopped(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with watch_for_stop(), pytest.raises(StoppedError, match=f"waiting for process {holder.pid}"):
        began = time.monotonic()
        Claim(tmp_path, KEY, on_wait=lambda owner: signal.raise_signal(signal.SIGTERM)).__enter__()
    assert time.monotonic() - began < 5


def test_a_live_owner_is_not_taken_over_however_silent(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.utime(tmp_path / "claims" / f"{KEY}.json", (0, 0))
    owner = Claim(tmp_path, KEY).try_acquire()
    assert owner is not None
    assert owner.pid == holder.pid


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_owner_is_taken_over_at_once(
    tmp_path: Path, holder: subprocess.Popen[str], reaped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    holder.kill()
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert held(tmp_path, KEY) is None
    with claim(tmp_path, KEY, on_wait=lambda owner: pytest.fail(f"waited for {owner}")):
        assert f"taking over the claim of process {holder.pid}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "silent_seconds", "live"),
    [
        ({}, 1e6, True),
        ({"process_start": 1.0}, 0, False),
        ({"host": "elsewhere"}, 0, True),
        ({"host": "elsewhere"}, 55, True),
        ({"host": "elsewhere"}, 61, False),
        ({"host": "elsewhere", "pid": 1}, 0, True),
        ({"pid_namespace": "pid:[1]"}, 0, True),
        ({"pid_namespace": "pid:[1]"}, 61, False),
        ({"boot_id": "earlier"}, time.time() - psutil.boot_time() + 60, False),
        ({"boot_id": "other machine of that name"}, 0, True),
    ],
    ids=[
        "this process, silent",
        "pid reused",
        "other host",
        "other host, slow",
        "other host, silent",
        "other host, pid used here",
        "other container",
        "other container, silent",
        "before this boot",
        "other boot, not silent",
    ],
)
def test_an_owner_counts_as_live_by_pid_here_and_by_heartbeat_elsewhere(
    tmp_path: Path, changes: dict[str, Any], silent_seconds: float, live: bool
) -> None:
    write_owner(tmp_path, silent_seconds, **changes)
    mine = Claim(tmp_path, KEY)
    assert (held(tmp_path, KEY) is not None) == live
    assert (mine.try_acquire() is not None) == live
    mine.release()


@pytest.mark.parametrize(("silent_seconds", "live"), [(0, True), (61, False)], ids=["fresh", "silent"])
@pytest.mark.parametrize("text", ["", "{", "[]"], ids=["empty", "cut", "list"])
def test_a_garbled_owner_file_is_judged_by_its_age(
    tmp_path: Path, text: str, silent_seconds: float, live: bool
) -> None:
    path = write_owner(tmp_path)
    path.write_text(text)
    os.utime(path, (time.time() - silent_seconds,) * 2)
    mine = Claim(tmp_path, KEY)
    assert (mine.try_acquire() is not None) == live
    mine.release()


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with claim(tmp_path, KEY):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_the_heartbeat_keeps_the_owner_file_fresh(tmp_path: Path) -> None:
    with Claim(tmp_path, KEY, heartbeat_seconds=0.01):
        path = tmp_path / "claims" / f"{KEY}.json"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 1 and time.monotonic() < deadline:
            pass
        assert path.stat().st_mtime > time.time() - 10


def test_a_claim_that_was_taken_over_is_noticed_and_left_to_its_new_owner(tmp_path: Path) -> None:
    with Claim(tmp_path, KEY, heartbeat_seconds=0.01) as mine:
        path = tmp_path / "claims" / f"{KEY}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere", "token": "theirs"}))
        for thread in threading.enumerate():
            if thread.name == f"claim-{KEY}":
                thread.join(timeout=10)
        before = sorted(tmp_path.rglob("*"))
        with claimed(lambda: require_claim(tmp_path, KEY, mine.token)):
            for write in (
                lambda: write_atomic(tmp_path / "x", "y"),
                lambda: MetricsFile(tmp_path / "m").append(step=1),
                stop_requested,
            ):
                with pytest.raises(ClaimLostError, match="another process took this stage over"):
                    write()
        assert sorted(tmp_path.rglob("*")) == before, "nothing was written"
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_forked_child_does_not_give_its_parents_claim_back(tmp_path: Path) -> None:
    with claim(tmp_path, KEY) as mine:
        child = os.fork()
        if child == 0:
            mine.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert held(tmp_path, KEY) is not None
