"""Kills and signals over torchrun's own agent: whoever is hit, one tree of processes, and the undisturbed run's result."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.integration.project import environment

Plan = list[dict[str, Any]]
WHOM = ("parent", "agent", "rank", "all")
WHEN = ("any", "training", "save")


def planned(launch: str, signals: tuple[str, ...], whom: tuple[str, ...], when: tuple[str, ...], real: bool) -> Plan:
    """One trial for each combination."""
    return [
        {"launch": launch, "signal": signal, "whom": victim, "when": moment, "real": real}
        for signal, victim, moment in product(signals, whom, when)
    ]


KILLS = planned("torchrun", ("SIGKILL",), WHOM, WHEN, False)
SIGNALS = planned("torchrun", ("SIGTERM",), ("parent", "rank", "all"), ("any", "training", "save"), False)
SIGNALS += planned("torchrun", ("SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"), ("parent", "all"), ("training",), False)
WITH_READERS = planned("torchrun", ("SIGTERM", "SIGKILL"), ("all", "parent"), ("training",), False)
REAL = planned("torchrun", ("SIGKILL",), ("parent",), ("any",), True) + planned(
    "torchrun", ("SIGKILL",), ("rank", "agent", "starter"), ("training",), True
)
REAL += planned("torchrun", ("SIGTERM",), ("all",), ("any",), True) + planned(
    "torchrun", ("SIGHUP",), ("parent",), ("any",), True
)
ALONE = planned("local", ("SIGKILL",), ("parent",), ("any", "save") * 10, False)
ALONE += planned("local", ("SIGTERM", "SIGINT", "SIGHUP"), ("parent",), ("any", "training"), False)
ALONE += [trial | {"readers": 1} for trial in planned("local", ("SIGTERM", "SIGKILL"), ("all",), ("training",), False)]
SHARDED = [
    trial
    for launch in ("zero2", "zero3")
    for trial in (
        *planned(launch, ("SIGKILL",), ("rank",), ("save",), False),
        *planned(launch, ("SIGKILL",), ("parent",), ("training",), False),
        *planned(launch, ("SIGTERM",), ("all",), ("training",), False),
    )
]
SUITE = {
    "kills": KILLS + KILLS[:6],
    "more kills": KILLS[6:] + KILLS,
    "signals": SIGNALS + [trial | {"readers": 1} for trial in WITH_READERS],
    "real": REAL,
    "sharded": SHARDED,
    "alone": ALONE,
}


def disturbed(folder: Path, plan: Plan, seed: int = 7) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integration.kill_harness", str(folder), json.dumps(plan), str(seed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def test_the_suite_kills_forty_times_and_signals_twenty_times_over_torchrun() -> None:
    trials = [trial for plan in SUITE.values() for trial in plan if trial["launch"] != "local"]
    kills = [trial for trial in trials if trial["signal"] == "SIGKILL"]
    assert len(kills) >= 40 and len(trials) - len(kills) >= 20
    assert {trial["whom"] for trial in kills} == {*WHOM, "starter"}


@pytest.mark.parametrize(
    "plan",
    [
        planned("local", ("SIGKILL",), ("parent",), ("any", "save"), False),
        planned("torchrun", ("SIGKILL",), ("parent",), ("save",), False)
        + planned("torchrun", ("SIGTERM",), ("all",), ("training",), False),
    ],
    ids=["one process", "two ranks"],
)
def test_a_run_that_is_killed_or_signalled_leaves_nothing_running_and_continues(plan: Plan, tmp_path: Path) -> None:
    found = disturbed(tmp_path, plan)
    assert found == {"trials": 2, "hits": 2, "faults": []}


@pytest.mark.slow
@pytest.mark.parametrize("part", SUITE)
def test_whoever_is_hit_the_same_command_ends_with_the_undisturbed_result(part: str, tmp_path: Path) -> None:
    found = disturbed(tmp_path, SUITE[part], seed=list(SUITE).index(part))
    assert found["faults"] == []
    assert found["hits"] >= 0.8 * found["trials"], "some end before their moment comes"
