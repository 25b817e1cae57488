"""Videos that are folders of frames: numbered from one, whole, and shown in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tinylmm.config.video import SamplingSpec
from tinylmm.data.frame_folders import folder_clip, folder_frames
from tinylmm.data.frame_sampling import frame_indices
from tinylmm.errors import DataError


def frames(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(1, count + 1):
        Image.new("RGB", (8, 6), (10 * number, 0, 0)).save(folder / f"{number:05d}.jpg", quality=95)
    return folder


def test_frames_are_numbered_from_one_and_three_a_second(tmp_path: Path) -> None:
    folder = frames(tmp_path / "clip", 12)
    clip = folder_clip(folder, 3.0)
    assert (clip.frames, clip.seconds, clip.first) == (12, 4.0, 1)
    numbers = frame_indices(SamplingSpec(segments=4), clip, (1.0, 3.0))
    assert numbers[0] >= 3 and numbers[-1] <= 9
    shown = folder_frames(folder, [12, 1, 5])
    reds = [image.getpixel((4, 3))[0] for image in shown]  # type: ignore[index]
    assert [round(red / 10) for red in reds] == [12, 1, 5]


def test_an_empty_folder_and_one_with_a_gap_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no frame 00001\.jpg"):
        folder_clip(tmp_path / "empty", 3.0)
    (frames(tmp_path / "clip", 4) / "00003.jpg").unlink()
    with pytest.raises(DataError, match=r"clip: frame 00003\.jpg is missing"):
        folder_clip(tmp_path / "clip", 3.0)
