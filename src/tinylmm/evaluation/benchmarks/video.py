"""What the video benchmarks share: where a question's video is, and subtitles.

An item's image is the video with the part and the frames that its protocol asks for; `reference["video"]`, a `VideoRef`, says
the same and where subtitles are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef


@dataclass(frozen=True)
class VideoRef:
    """The video of an item. Whether it exists shows when it is opened: scoring needs none.

    Attributes:
        path: video file, or folder of frames `00001.jpg`, `00002.jpg`, ...
        start, end: the part that is meant, in seconds; None for all of it.
        fps: frames a second of a folder of frames; None for a video file, which says so itself.
        subtitles: file with them; None where the benchmark has none.
        sampling: the frames that the benchmark's protocol asks for; None where it asks for none, and the model's own are shown.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    subtitles: Path | None = None
    sampling: SamplingSpec | None = None

    @property
    def shown(self) -> ImageRef:
        """It as an item's image."""
        part = None if self.start is None or self.end is None else (float(self.start), float(self.end))
        return ImageRef(self.path, video=True, part=part, sampling=self.sampling, fps=self.fps)


@dataclass(frozen=True)
class Subtitle:
    """One subtitle, from `start` to `end` in seconds."""

    start: float
    end: float
    text: str


_TIMES = re.compile(r"(\d+:\d+:\d+[,.]\d+)\s*-->\s*(\d+:\d+:\d+[,.]\d+)")
_TAGS = re.compile(r"<[^>]*>")


def read_srt(path: Path) -> list[Subtitle]:
    """Read an SRT file, without its font tags.

    Raises:
        DataError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as subtitles ({error}). Fetch the file again.") from error
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = block.strip().split("\n")
        number = next((n for n, line in enumerate(lines[:2]) if _TIMES.search(line)), None)
        if number is not None:
            times = _TIMES.search(lines[number])
            assert times is not None
            words = _TAGS.sub("", " ".join(lines[number + 1 :])).strip()
            found.append(Subtitle(seconds_of(times.group(1)), seconds_of(times.group(2)), words))
    return found


def subtitles_at(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[str]:
    """The texts shown at any of `times` (seconds of the sampled frames), each once, in order."""
    return [s.text for s in subtitles if s.text and any(s.start <= time < s.end for time in times)]


def seconds_of(text: str) -> float:
    """Seconds of `1:02:03.5` or `01:02:03,500`.

    Raises:
        ValueError: it is something else.
    """
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def video_path(folder: Path, name: Any, where: str) -> Path:
    """A video named by a question file, inside `folder`.

    Raises:
        DataError: no relative path, or one that climbs out of the folder; `where` names file and record.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
        raise DataError(f"{where}: video {name!r} must be a path inside {folder}. Correct the record.")
    return folder / name
