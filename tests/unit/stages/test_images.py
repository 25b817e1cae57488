"""The images stage: every image of a source once, in any number of processes, and on from where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinylmm.errors import StageFailedError, StoppedError
from tinylmm.planning.specs import StageSettings
from tinylmm.stages import images, pool, sources
from tinylmm.stages.images import SeenNames, read_faults
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stop import watch_for_stop

COUNT = 200


@pytest.fixture
def job(tmp_path: Path) -> StageJob[Any]:
    """A job over COUNT records of half as many images, of which every tenth is missing."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"image": f"{number // 2}.png", "conversations": turns} for number in range(COUNT)]
    for number in range(COUNT // 2):
        if number % 10:
            Image.new("RGB", (20, 10), (number, 0, 0)).save(root / "images" / f"{number}.png")
    (root / "a.json").write_text(json.dumps(records))
    fields = {"annotations": "a.json", "images": "images", "format": "llava"}
    settings = {"launch": {"num_workers": 0}, "location": {"root": str(root), "source": fields}, "folders": {}}
    spec = {"source": {"format": "llava", "limit": None, "content": {}}}
    made = make_job("images", "images[x]", "ab" * 32, spec, {}, settings, tmp_path / "work", tmp_path / "store")
    made.output.mkdir(parents=True)
    return made


def in_processes(job: StageJob[Any], count: int) -> StageJob[Any]:
    settings = job.settings.as_json() | {"launch": {"num_workers": count}}
    return replace(job, settings=StageSettings.model_validate(settings))


MISSING = {f"{number}.png" for number in range(0, COUNT // 2, 10)}


def test_each_image_is_looked_at_once_and_those_that_cannot_be_used_are_named(
    job: StageJob[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    check = images.check_image
    monkeypatch.setattr(images, "check_image", lambda path: looked.append(path) or check(path))
    assert images.run(job) == {"images": 90, "faulty": 10}
    faults = read_faults(job.output)
    assert set(faults) == MISSING and all("not found under" in fault for fault in faults.values())
    assert len(looked) == len(set(looked)) == 90


@pytest.mark.parametrize("count", [1, 2])
def test_processes_find_what_one_finds(job: StageJob[Any], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SERIAL_BELOW", 10)
    monkeypatch.setattr(images, "AT_ONCE", 7)
    assert images.run(in_processes(job, count)) == {"images": 90, "faulty": 10}
    assert set(read_faults(job.output)) == MISSING


@pytest.mark.parametrize("damage", ["none", "half a row", "another bit"])
def test_a_check_that_was_stopped_goes_on_behind_its_last_whole_batch(
    job: StageJob[Any], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "AT_ONCE", 8)
    looked: list[str] = []
    check = images.check_image

    def signalled(path: Path) -> None:
        looked.append(path.name)
        if len(looked) == 30:
            signal.raise_signal(signal.SIGTERM)
        check(path)

    monkeypatch.setattr(images, "check_image", signalled)
    with watch_for_stop(), pytest.raises(StoppedError, match="stopped while checking images; the same command"):
        images.run(job)
    kept = job.folder / "scratch" / images.CHECKED_FILE
    batches = kept.read_bytes()
    assert len(batches.splitlines()) == 5, "the batch at hand is finished"
    if damage == "half a row":
        kept.write_bytes(batches[:-5])
    elif damage == "another bit":
        kept.write_bytes(batches.replace(b'"batch": 2', b'"batch": 3'))
    before = len(looked)
    assert images.run(job) == {"images": 90, "faulty": 10}
    again = set(looked[:before]) & set(looked[before:])
    assert len(again) == {"none": 0, "half a row": 8, "another bit": 22}[damage]  # 20.png and 30.png are missing
    assert set(read_faults(job.output)) == MISSING


def test_a_stop_does_not_wait_for_what_processes_have_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    with watch_for_stop(), pytest.raises(StoppedError):
        asker.start()
        began = time.monotonic()
        list(pool.in_order(time.sleep, iter([60.0] * 8), 2, "sleeping"))
    assert time.monotonic() - began < 5


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_named_with_what_to_do() -> None:
    with pytest.raises(StageFailedError, match=r"a process died while exiting.*launch\.num_workers"):
        list(pool.in_order(die, iter([1, 1, 1]), 2, "exiting"))


def test_results_come_in_the_order_of_their_pieces_and_few_are_read_ahead() -> None:
    read: list[int] = []
    done = pool.in_order(abs, (read.append(n) or -n for n in range(100)), 2, "counting")
    assert next(done) == 0
    assert len(read) <= 2 * pool.AHEAD + 1
    assert list(done) == list(range(1, 100))


def test_seen_names_tell_what_is_new_across_their_runs() -> None:
    seen = SeenNames()
    names = [f"{number}.jpg" for number in range(200_000)]
    assert all(map(seen.is_new, names))
    assert not any(map(seen.is_new, names[::17]))
    assert seen.is_new("other.jpg")


def test_how_far_a_pass_is_stands_in_the_stages_rows(job: StageJob[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(images, "SERIAL_BELOW", 10)
    images.run(job)
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["done"] for row in rows] == [32, 64, 96, 100]
    assert {row["of"] for row in rows} == {"images"} and rows[-1]["share"] == 1.0
