"""Features of clips: one folder a clip and choice of frames, whoever asks, and on from where it was stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import tiny_lmm
from tinylmm.errors import StoppedError
from tinylmm.training import clip_features
from tinylmm.training.clip_features import ClipFeatures, MixedFeatures, open_clips
from tinylmm.training.features import open_features

CLIPS = {"a.mp4": 2, "b.mp4": 5, "c.mp4": 1}
FRAMES = dict(CLIPS)


def pixels(name: str) -> torch.Tensor:
    return torch.rand(FRAMES[name], 3, 16, 16, generator=torch.Generator().manual_seed(ord(name[0])))


def opened(
    root: Path, clips: dict[str, int] = CLIPS, stage: str = "train-0", load: Callable[[str], torch.Tensor] = pixels
) -> ClipFeatures:
    tower = tiny_lmm().vision_tower

    def stamp(name: str) -> object:
        return [name, clips[name]]

    return open_clips(tower, clips, load, stamp, root / "features", root / stage, {"mode": "pad"})


def test_each_clip_is_what_the_tower_makes_of_its_frames(tmp_path: Path) -> None:
    found = opened(tmp_path)
    tower = tiny_lmm().vision_tower
    with torch.no_grad():
        for name, count in CLIPS.items():
            assert found(name).shape == (count, tower.num_tokens, tower.hidden_size)
            torch.testing.assert_close(found(name), tower(pixels(name)))
    keys = json.loads((tmp_path / "train-0/features.json").read_text())
    assert sorted(keys) == sorted(path.name for path in (tmp_path / "features").iterdir()) and len(keys) == 3


def test_another_stage_computes_only_what_is_new_to_it(tmp_path: Path) -> None:
    assert opened(tmp_path, {"a.mp4": 2, "b.mp4": 5}).computed == 2
    loaded: list[str] = []
    found = opened(tmp_path, stage="eval-0", load=lambda name: loaded.append(name) or pixels(name))  # type: ignore[func-returns-value]
    assert (found.computed, loaded) == (1, ["c.mp4"])


def test_a_damaged_clip_is_computed_again_and_no_other(tmp_path: Path) -> None:
    first = opened(tmp_path)
    path = first.folders["b.mp4"] / "features.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    again = opened(tmp_path)
    assert again.computed == 1
    with torch.no_grad():
        torch.testing.assert_close(again("b.mp4"), tiny_lmm().vision_tower(pixels("b.mp4")))


def test_a_stop_keeps_the_clips_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(clip_features, "stop_requested", lambda: next(asked))
        with pytest.raises(StoppedError, match="after the features of 1 of 3 clips; the same command continues"):
            opened(tmp_path)
    assert opened(tmp_path).computed == 2


def test_images_and_clips_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    tower = tiny_lmm().vision_tower
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(9))
    images = open_features(tower, ["i.png"], lambda name: image, str, tmp_path / "features", tmp_path / "train-0", {})
    mixed = MixedFeatures(images, opened(tmp_path))
    with torch.no_grad():
        expected = tower(torch.cat([pixels("c.mp4"), image[None], pixels("a.mp4")]))
    torch.testing.assert_close(mixed(["c.mp4", "i.png", "a.mp4"]), expected)
    assert len(json.loads((tmp_path / "train-0/features.json").read_text())) == 4


def test_the_tower_goes_on_while_a_clips_features_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, publish = clip_features.encode_views, clip_features._publish
    encoded, published = [threading.Event() for _ in CLIPS], [0]

    def encoding(*given: Any) -> torch.Tensor:
        next(event for event in encoded if not event.is_set()).set()
        return encode(*given)

    def publishing(*given: Any) -> None:
        published[0] += 1
        assert encoded[min(published[0], 2)].wait(60), "the tower waits for the disk"
        publish(*given)

    monkeypatch.setattr(clip_features, "encode_views", encoding)
    monkeypatch.setattr(clip_features, "_publish", publishing)
    found = opened(tmp_path)
    assert (found.computed, published) == (3, [3])
    sizes = sum(path.stat().st_size for path in (tmp_path / "features").rglob("features.bin"))
    assert (len(found), found.disk_bytes) == (3, sizes)
