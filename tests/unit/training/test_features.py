"""Cached features of frozen towers: keyed by all that decides them, and known to belong to the stages that read them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.builders import tiny_lmm
from tinylmm.errors import DiskError, StoppedError
from tinylmm.stop import watch_for_stop
from tinylmm.training import features
from tinylmm.training.features import FeatureCache, open_features

IMAGES = ["a.png", "b.png", "c.png"]


def pixels(name: str) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(ord(name[0])))


def opened(root: Path, stage: str = "train-0", load: Callable[[str], torch.Tensor] = pixels) -> FeatureCache:
    tower = tiny_lmm().vision_tower
    return open_features(tower, IMAGES, load, str, root / "features", root / stage, {"mode": "pad"})


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "features").iterdir())


def test_a_second_stage_reads_what_the_first_one_computed(tmp_path: Path) -> None:
    first = opened(tmp_path)(IMAGES)
    made = (tmp_path / "features" / folders(tmp_path)[0] / "features.bin").stat().st_mtime_ns
    torch.testing.assert_close(opened(tmp_path, "train-1")(IMAGES), first, atol=0, rtol=0)
    assert [(tmp_path / "features" / name / "features.bin").stat().st_mtime_ns for name in folders(tmp_path)] == [made]


def test_each_stage_notes_which_features_it_reads(tmp_path: Path) -> None:
    for stage in ("train-0", "train-1"):
        opened(tmp_path, stage)
        assert json.loads((tmp_path / stage / "features.json").read_text()) == folders(tmp_path)


def test_another_version_of_the_code_or_of_a_library_reads_no_older_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    monkeypatch.setattr(features, "FEATURES_VERSION", features.FEATURES_VERSION + 1)
    opened(tmp_path)
    assert len(folders(tmp_path)) == 2
    monkeypatch.setattr(features, "version", lambda name: "0.1")
    opened(tmp_path)
    assert len(folders(tmp_path)) == 3


def test_damaged_features_are_computed_again(tmp_path: Path) -> None:
    first = opened(tmp_path)(IMAGES).clone()
    path = tmp_path / "features" / folders(tmp_path)[0] / "features.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    torch.testing.assert_close(opened(tmp_path)(IMAGES), first, atol=0, rtol=0)


def broken_off(root: Path) -> None:
    """Two of three chunks are done when SIGTERM comes."""
    signalled = threading.Event()

    def load(name: str) -> torch.Tensor:
        if name == "c.png":  # is read while the tower has the second one
            os.kill(os.getpid(), signal.SIGTERM)
            signalled.set()
        elif name == "b.png":
            signalled.wait()
        return pixels(name)

    with (
        watch_for_stop(),
        mock.patch.object(features, "usable_cores", return_value=2),
        pytest.raises(StoppedError, match="about 2 of 3 images; the same command continues"),
    ):
        opened(root, load=load)


@pytest.mark.parametrize(
    ("damage", "left"), [(None, "c.png"), ("features.bin", "a.png c.png"), ("list", "b.png c.png")]
)
def test_a_stop_keeps_the_chunks_that_are_whole(
    damage: str | None, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK_IMAGES", 1)
    undisturbed = opened(tmp_path / "other")(IMAGES)
    broken_off(tmp_path)
    part = tmp_path / "train-0/features.part"
    if damage == "features.bin":
        content = bytearray((part / damage).read_bytes())
        content[5] ^= 1
        (part / damage).write_bytes(content)
    elif damage == "list":
        (path,) = part.glob("*-0")
        path.write_text(path.read_text()[:-2])
    again: list[str] = []
    found = opened(tmp_path, load=lambda name: again.append(name) or pixels(name))  # type: ignore[func-returns-value]
    assert again == left.split()
    torch.testing.assert_close(found(IMAGES), undisturbed, atol=0, rtol=0)
    assert sorted(path.name for path in (tmp_path / "features").glob("*/*")) == [
        "COMPLETE",
        "features.bin",
        "manifest.json",
    ]


def test_features_that_find_no_room_are_refused_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        (disk / "other").write_bytes(b"x")  # a page of two; the list of features takes the other
        with pytest.raises(DiskError, match=r"disk is full: writing .*features\.bin needs [\d,]+ bytes"):
            opened(disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_tower_goes_on_while_its_features_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK_IMAGES", 1)
    undisturbed = opened(tmp_path / "other")(IMAGES)
    encode, write, encoded = features.encode_views, features._write, [threading.Event() for _ in IMAGES]

    def encoding(*given: Any) -> torch.Tensor:
        next(event for event in encoded if not event.is_set()).set()
        return encode(*given)

    def writing(rows: torch.Tensor, made: torch.Tensor, done: Any, number: int) -> None:
        assert encoded[min(number + 1, 2)].wait(60), "the tower waits for the disk"
        write(rows, made, done, number)

    monkeypatch.setattr(features, "encode_views", encoding)
    monkeypatch.setattr(features, "_write", writing)
    torch.testing.assert_close(opened(tmp_path)(IMAGES), undisturbed, atol=0, rtol=0)


@pytest.mark.parametrize("chunk", [0, 2], ids=["the first", "the last"])
def test_what_the_disk_refuses_behind_the_tower_is_raised(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK_IMAGES", 1)
    write = features._write

    def writing(rows: torch.Tensor, made: torch.Tensor, done: Any, number: int) -> None:
        if number == chunk:
            raise DiskError("no room")
        write(rows, made, done, number)

    monkeypatch.setattr(features, "_write", writing)
    with pytest.raises(DiskError, match="no room"):
        opened(tmp_path)
    assert not (tmp_path / "features").exists()


def test_a_cache_says_what_it_had_to_compute_and_what_it_takes(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path, "train-1")
    assert (first.computed, second.computed, len(second)) == (3, 0, 3)
    (path,) = (tmp_path / "features").glob("*/features.bin")
    assert first.disk_bytes == second.disk_bytes == path.stat().st_size
