"""A record of a process says whether that very process still runs, as far as this host can see it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest

from tinylmm.store.provenance import ended_with_boot, is_running, now, peak_rss_mib, software_versions, this_process


def test_this_process_is_running() -> None:
    assert is_running(this_process()) is True
    assert this_process().pid == os.getpid()


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_process_that_ended_is_not_running(reaped: bool) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        child.wait()
    assert is_running(replace(this_process(), pid=child.pid)) is False
    child.wait()


def test_a_reused_pid_is_told_by_its_start() -> None:
    assert is_running(replace(this_process(), process_start=this_process().process_start + 100)) is False


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot_id": "other"}, {"pid_namespace": "pid:[1]"}])
def test_nothing_is_said_of_processes_that_cannot_be_seen(change: dict[str, Any]) -> None:
    assert is_running(replace(this_process(), **change)) is None


@pytest.mark.parametrize(
    ("change", "before_boot", "ended"),
    [
        ({"boot_id": "old"}, True, True),
        ({"boot_id": "old"}, False, False),
        ({}, True, False),
        ({"host": "b"}, True, False),
    ],
    ids=["rebooted since", "other machine of that name", "same boot", "other host"],
)
def test_a_reboot_ends_processes(change: dict[str, Any], before_boot: bool, ended: bool) -> None:
    last_sign = psutil.boot_time() - 100 if before_boot else time.time()
    assert ended_with_boot(replace(this_process(), **change), last_sign) is ended


def test_versions_and_memory_are_known_without_importing_torch() -> None:
    code = """
import sys
import tinylmm.cli.store
from tinylmm.store.provenance import software_versions
assert software_versions()["torch"]
heavy = {"torch", "transformers", "datasets", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert software_versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 < peak_rss_mib() < 1e6
    assert now().endswith("+00:00")
