"""The starter serves this process: one for each environment that ranks are loaded under, and none that nobody needs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tinylmm.launch import starting


@pytest.fixture(autouse=True)
def _own_starters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_running", [])


def ended(started: starting.Started) -> int:
    while (code := started.poll()) is None:
        time.sleep(0.01)
    return code


def test_a_process_that_fails_leaves_its_words_in_its_own_log_and_the_next_one_has_the_same_starter(
    tmp_path: Path,
) -> None:
    codes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        codes.append(ended(starting.start_worker(tmp_path / name, "anew")))
        assert f"{tmp_path / name}/job.json" in (tmp_path / name / "log.txt").read_text()
    assert codes == [1, 1] and len(starting._running) == 1


def test_what_is_ended_while_its_starter_loads_does_not_wait_for_that(tmp_path: Path) -> None:
    started = starting.start_torchrun(tmp_path, "fork", dict(os.environ), ["--nproc-per-node=2"])
    starter = starting._running[0][2]
    started.kill()
    assert not starter.alive and started.poll() == -9
    assert not (tmp_path / "log.txt").exists(), "nothing was started"


def test_a_starter_serves_the_environment_it_was_loaded_under_and_an_idle_one_makes_room_for_another(
    tmp_path: Path,
) -> None:
    variables = [dict(os.environ) | {"OMP_NUM_THREADS": number} for number in ("1", "1", "2")]
    begun = []
    for number, environment in enumerate(variables):
        folder = tmp_path / str(number)
        folder.mkdir()
        begun.append(starting._starter("anew", environment))
    assert begun[0] is begun[1] and begun[2] is not begun[0]
    assert not begun[0].alive and begun[2].alive
    busy = starting.start_torchrun(tmp_path / "2", "anew", variables[2], ["--nproc-per-node=1", "--nobody-knows"])
    other = starting._starter("anew", variables[0])
    assert begun[2].alive and other.alive, "one with a stage under way stays"
    assert ended(busy) == 2, "torchrun's own code for words that it does not know"
    starting._starter("anew", variables[0])
    assert not begun[2].alive
