"""Cached features of frozen towers: keyed by all that decides them, and known to belong to the stages that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builders import tiny_lmm
from tinylmm.training import features
from tinylmm.training.features import FeatureCache, open_features

IMAGES = ["a.png", "b.png", "c.png"]


def pixels(name: str) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(ord(name[0])))


def opened(root: Path, stage: str = "train-0") -> FeatureCache:
    tower = tiny_lmm().vision_tower
    return open_features(tower, IMAGES, pixels, str, root / "features", root / stage, {"mode": "pad"})


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
