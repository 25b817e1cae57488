"""Which frames of each video are shown: a list that the `images` stage leaves, so that nobody opens a video to know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

CLIPS_FILE = "clips.jsonl"
"""In the stage's output, where a sampling was given: {"video", "frames"} of each video that can be used."""


def write_clips(output: Path, clips: Mapping[str, Sequence[int]]) -> None:
    """Write the numbers of each video's frames into a folder, by name."""
    lines = [json.dumps({"video": name, "frames": list(frames)}) + "\n" for name, frames in sorted(clips.items())]
    (output / CLIPS_FILE).write_text("".join(lines), encoding="utf-8")


def takes_videos(output: Path) -> bool:
    """Whether a sampling was given, so that records with videos can be used."""
    return (output / CLIPS_FILE).exists()


def read_clips(output: Path) -> dict[str, tuple[int, ...]]:
    """What `write_clips` wrote into a folder; nothing where no sampling was given."""
    if not takes_videos(output):
        return {}
    lines = (output / CLIPS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return {row["video"]: tuple(row["frames"]) for row in map(json.loads, lines)}
