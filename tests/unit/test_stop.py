"""A signal is one request, heard in time by whatever runs, and a run's helpers live and die with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylmm import stop
from tinylmm.stop import (
    STOP_FILE,
    STOP_SIGNALS,
    TerminatedError,
    ended_by_signals,
    stop_requested,
    uninterrupted,
    watch_for_stop,
)


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(stop, "REPEAT_SECONDS", 0.1)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=[number.name for number in STOP_SIGNALS])
def test_every_signal_that_ends_work_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with watch_for_stop():
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
    assert signal.getsignal(number) is before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watch_for_stop():
            signal.raise_signal(signal.SIGHUP)
            assert not stop_requested()
        with watch_for_stop(Path("of a rank")):
            signal.raise_signal(signal.SIGHUP)
            assert stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_signal_twice_within_moments_is_one_request_and_later_gives_up(short: None) -> None:
    with watch_for_stop():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
        wait(0.15)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_rank_never_gives_up_by_itself(short: None, tmp_path: Path) -> None:
    with watch_for_stop(tmp_path):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            assert stop_requested()
            wait(0.15)


def test_what_does_not_ask_is_interrupted(short: None) -> None:
    with watch_for_stop():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            wait(5)


def test_what_asks_is_not_interrupted(short: None) -> None:
    with watch_for_stop():
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
        wait(0.3)


def test_what_has_something_to_save_takes_its_time_and_is_interrupted_behind_it(short: None) -> None:
    with watch_for_stop():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            wait(0.3)
        with pytest.raises(KeyboardInterrupt):
            wait(5)


def test_a_request_that_is_older_than_the_rank_is_heard_too(short: None, tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    with watch_for_stop(tmp_path), pytest.raises(KeyboardInterrupt):
        wait(5)


def test_a_request_during_an_inner_watch_reaches_the_outer_one() -> None:
    with watch_for_stop():
        with watch_for_stop():
            signal.raise_signal(signal.SIGTERM)
        assert stop_requested()


def test_a_command_with_nothing_to_save_is_ended_in_order() -> None:
    with pytest.raises(TerminatedError, match="SIGHUP"), ended_by_signals():
        signal.raise_signal(signal.SIGHUP)


HELPER = """
import os, signal, sys, time
from pathlib import Path
from tinylmm.stop import belong_to, held_back
mine, beat = os.getpid(), Path(sys.argv[1])
with held_back():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # waits, as it would while a helper starts
        belong_to(mine)
        while True:
            beat.write_text(str(time.time()))
            time.sleep(0.02)
print(child, flush=True)
time.sleep(60)
"""


def test_a_helper_ignores_signals_and_dies_with_its_parent(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    parent = subprocess.Popen([sys.executable, "-c", HELPER, str(beat)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    while not beat.exists():
        wait(0.02)
    for number in STOP_SIGNALS:
        os.kill(helper, number)
    wait(0.1)
    assert time.time() - float(beat.read_text() or time.time()) < 5
    seen = beat.stat().st_mtime_ns
    wait(0.5)
    assert beat.stat().st_mtime_ns > seen, "the helper works on"
    parent.kill()
    parent.wait()
    wait(0.5)
    seen = beat.stat().st_mtime_ns
    wait(0.5)
    assert beat.stat().st_mtime_ns == seen, "the helper is gone"


def test_a_helper_whose_parent_is_gone_already_does_not_start() -> None:
    code = "from tinylmm.stop import belong_to; belong_to(1); print('works')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_request_ends_with_the_outermost_watch() -> None:
    with watch_for_stop():
        signal.raise_signal(signal.SIGTERM)
    assert not stop_requested()
