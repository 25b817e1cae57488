"""Which frames of a clip are shown: index arithmetic alone, index for index what TinyLLaVA-Video's readers choose.

| sampling | published place |
| --- | --- |
| `{uniform: 16}` | training with `num_frames 16`; MMVU and MVBench's `video`; Video-R1's training |
| `{fps: 1}` | training with `num_frames -1`, which knows no upper limit |
| `{fps: 1, max: 64}` | MMVU and MVBench's `video` with `--num_frame -1 --max_frame 64` |
| `{uniform: 16, distinct: true}`, `{fps: 1, max: 64, distinct: true}` | Video-MME and MLVU |
| `{segments: 16}`, `{fps: 1, max: 64, middle: true}` | MVBench's `video_avi`, `video_webm`, `frame` (TSN, arXiv 1608.00859) |
| `{left_edge: 16}` | LongVideoBench |

Frames are counted in the order in which they are shown, whatever the time between them. What is a fault there is not
copied: MVBench's `video` reader and MMVU's ignore the part that a question is about (here every sampling keeps to a given
part); the Video-MME reader of clips with a varying rate takes a number of time-base units for seconds and so always shows
`max` frames; a clip for which the container reports no frames asks for frame -1; a clip under a second divides by zero in
LongVideoBench (here it shows one frame); and a length from a question file that is longer than the clip, or a part that begins
behind its end, asks for frames that do not exist (here for the last ones).

A part decides where frames lie, never how many they are: as in MVBench's readers, that comes from the whole clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinylmm.config.video import Baseline, SamplingSpec


@dataclass(frozen=True)
class Clip:
    """What a sampler knows of a clip.

    Attributes:
        frames: how many it has, at least 1.
        fps: its average rate, frames a second.
        seconds: its length; by default that of `frames` at `fps`.
        first: number of its first frame: 0 in a video file, 1 in MVBench's folders of `00001.jpg`, ...

    Raises:
        ValueError: no frames, or a rate or a length that is not positive.
    """

    frames: int
    fps: float
    seconds: float = 0.0
    first: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.fps > 0 or self.seconds < 0:
            raise ValueError(f"a clip needs frames, a rate and a length above 0, not {self}")
        if not self.seconds:
            object.__setattr__(self, "seconds", self.frames / self.fps)


def frame_indices(sampling: SamplingSpec, clip: Clip, part: tuple[float, float] | None = None) -> list[int]:
    """Return the numbers of the frames to show, ascending, repeated where the clip is too short and `distinct` is off.

    Args:
        part: seconds from the start of the clip between which the frames must lie; None for all of it.
    """
    start, end = _bounds(clip, part)
    wanted = frame_count(sampling, clip.seconds)
    if sampling.segments is not None or sampling.middle:
        size = (end - start) / wanted
        return [int(start + size / 2 + round(size * i)) for i in range(wanted)]
    if sampling.left_edge is not None:
        step = int(min(int(clip.seconds * clip.fps), end - start + 1) / wanted)
        return [start + step * i for i in range(wanted)]
    chosen = np.linspace(start, end, wanted).astype(np.int64).tolist()
    return list(dict.fromkeys(chosen)) if sampling.distinct else chosen


def baseline_indices(
    baseline: Baseline, chosen: Sequence[int], clip: Clip, part: tuple[float, float] | None = None
) -> list[int]:
    """Return the frames that a baseline shows in place of `chosen`: those without their order, or the middle one alone.

    The order is drawn by what the clip and the choice are, so it is the same every time; it is another one than that of time
    wherever there is another.
    """
    if baseline == "middle":
        return frame_indices(SamplingSpec(segments=1), clip, part)
    random = np.random.default_rng([clip.frames, len(chosen), chosen[0], chosen[-1]])
    shuffled = [chosen[place] for place in random.permutation(len(chosen))]
    return shuffled if shuffled != list(chosen) else [*chosen[1:], chosen[0]]


def frame_count(sampling: SamplingSpec, seconds: float) -> int:
    """Return how many frames are shown of so many seconds, at least 1; `distinct` may leave fewer of a short clip."""
    if sampling.fps is not None:
        wanted = int(seconds * sampling.fps)
        return max(1, wanted if sampling.max is None else min(sampling.max, wanted))
    if sampling.left_edge is not None:
        return max(1, min(sampling.left_edge, int(seconds)))
    fixed = sampling.uniform or sampling.segments
    assert fixed is not None
    return fixed


def _bounds(clip: Clip, part: tuple[float, float] | None) -> tuple[int, int]:
    """First and last frame of a part, inside the clip."""
    last = clip.first + clip.frames - 1
    if part is None:
        return clip.first, last
    start = min(max(clip.first, round(part[0] * clip.fps)), last)
    return start, max(start, min(round(part[1] * clip.fps), last))
