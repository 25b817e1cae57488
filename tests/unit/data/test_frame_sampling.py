"""Frames as TinyLLaVA-Video's readers choose them, as literal indices of the published arithmetic."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tinylmm.config.video import SamplingSpec
from tinylmm.data.frame_sampling import Clip, baseline_indices, frame_count, frame_indices

SIXTEENTHS = [0, 19, 39, 59, 79, 99, 119, 139, 159, 179, 199, 219, 239, 259, 279, 299]
MIDDLES = [9, 28, 46, 65, 84, 102, 121, 140, 159, 177, 196, 215, 233, 252, 271, 289]
SECONDS = [0, 30, 60, 90, 120, 150, 180, 210, 240, 270]
WHOLE: list[tuple[dict[str, Any], tuple[int, float], list[int]]] = [
    ({"uniform": 16}, (300, 30.0), SIXTEENTHS),
    ({"uniform": 16}, (16, 8.0), list(range(16))),
    ({"uniform": 16}, (5, 25.0), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4]),
    ({"uniform": 16}, (450, 29.97), [0, 29, 59, 89, 119, 149, 179, 209, 239, 269, 299, 329, 359, 389, 419, 449]),
    ({"uniform": 8}, (101, 23.976), [0, 14, 28, 42, 57, 71, 85, 100]),
    ({"uniform": 4}, (1, 25.0), [0, 0, 0, 0]),
    ({"uniform": 2}, (9, 3.0), [0, 8]),
    ({"uniform": 1}, (77, 25.0), [0]),
    ({"uniform": 16, "distinct": True}, (300, 30.0), SIXTEENTHS),
    ({"uniform": 16, "distinct": True}, (5, 25.0), [0, 1, 2, 3, 4]),
    ({"uniform": 16, "distinct": True}, (17, 25.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]),
    ({"uniform": 7, "distinct": True}, (8, 25.0), [0, 1, 2, 3, 4, 5, 7]),
    ({"fps": 1}, (300, 30.0), [0, 33, 66, 99, 132, 166, 199, 232, 265, 299]),
    ({"fps": 1}, (299, 30.0), [0, 37, 74, 111, 149, 186, 223, 260, 298]),
    ({"fps": 1}, (375, 29.97), [0, 34, 68, 102, 136, 170, 204, 238, 272, 306, 340, 374]),
    ({"fps": 1}, (12, 25.0), [0]),
    ({"fps": 1}, (1, 25.0), [0]),
    ({"fps": 1}, (3, 0.25), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]),
    ({"fps": 2}, (75, 25.0), [0, 14, 29, 44, 59, 74]),
    ({"fps": 0.5}, (250, 25.0), [0, 62, 124, 186, 249]),
    ({"fps": 1, "max": 4}, (300, 30.0), [0, 99, 199, 299]),
    ({"fps": 1, "max": 64}, (100, 25.0), [0, 33, 66, 99]),
    ({"fps": 1, "max": 8}, (5000, 25.0), [0, 714, 1428, 2142, 2856, 3570, 4284, 4999]),
    ({"fps": 1, "max": 64, "distinct": True}, (3, 0.5), [0, 1, 2]),
    ({"fps": 1, "max": 3, "distinct": True}, (90, 30.0), [0, 44, 89]),
    ({"segments": 16}, (300, 30.0), MIDDLES),
    ({"segments": 16}, (10, 25.0), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 8]),
    ({"segments": 8}, (100, 25.0), [6, 18, 31, 43, 56, 68, 80, 93]),
    ({"segments": 8}, (77, 29.97), [4, 14, 23, 32, 42, 52, 61, 70]),
    ({"segments": 4}, (1, 25.0), [0, 0, 0, 0]),
    ({"segments": 1}, (99, 25.0), [49]),
    ({"left_edge": 16}, (300, 30.0), SECONDS),
    ({"left_edge": 16}, (301, 29.97), SECONDS),
    ({"left_edge": 4}, (300, 30.0), [0, 75, 150, 225]),
    ({"left_edge": 3}, (125, 12.5), [0, 41, 82]),
    ({"left_edge": 16}, (20, 25.0), [0]),
]
PARTS: list[tuple[dict[str, Any], Clip, tuple[float, float] | None, list[int]]] = [
    ({"segments": 8}, Clip(100, 25.0), (1.0, 3.0), [28, 34, 40, 47, 53, 59, 66, 72]),
    ({"segments": 4}, Clip(100, 25.0), (3.0, 20.0), [78, 84, 90, 96]),
    ({"segments": 5}, Clip(450, 29.97), (2.5, 7.25), [89, 117, 146, 174, 203]),
    ({"segments": 8}, Clip(30, 3.0, first=1), None, [2, 6, 9, 13, 16, 20, 24, 27]),
    ({"segments": 8}, Clip(30, 3.0, first=1), (0.0, 10.0), [2, 6, 9, 13, 16, 20, 24, 27]),
    ({"segments": 4}, Clip(6, 3.0, first=1), None, [1, 2, 3, 5]),
    ({"segments": 3}, Clip(100, 25.0), (9.0, 12.0), [99, 99, 99]),
    ({"uniform": 3}, Clip(100, 25.0), (1.0, 2.0), [25, 37, 50]),
    ({"fps": 1, "max": 2}, Clip(100, 25.0), (1.0, 3.0), [25, 75]),
    ({"fps": 1}, Clip(100, 25.0), (1.0, 3.0), [25, 41, 58, 75]),
    ({"fps": 1, "max": 64, "middle": True}, Clip(200, 25.0), (1.0, 3.0), [28, 34, 40, 47, 53, 59, 66, 72]),
    ({"fps": 1, "max": 4, "middle": True}, Clip(100, 25.0), (3.0, 20.0), [78, 84, 90, 96]),
    ({"left_edge": 2}, Clip(100, 25.0), (1.0, 3.0), [25, 50]),
    ({"left_edge": 4}, Clip(100, 25.0, seconds=9.0), None, [0, 25, 50, 75]),
]


def name(case: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in case[:-1])


@pytest.mark.parametrize("case", WHOLE, ids=name)
def test_a_whole_clip(case: tuple[dict[str, Any], tuple[int, float], list[int]]) -> None:
    sampling, clip, expected = case
    assert frame_indices(SamplingSpec(**sampling), Clip(*clip)) == expected


@pytest.mark.parametrize("case", PARTS, ids=name)
def test_a_part_of_a_clip(case: tuple[dict[str, Any], Clip, tuple[float, float] | None, list[int]]) -> None:
    sampling, clip, part, expected = case
    assert frame_indices(SamplingSpec(**sampling), clip, part) == expected


def _published_tsn(n: int, fps: float, last: int, first: int, bounds: tuple[float, float]) -> list[int]:
    start, end = max(first, round(bounds[0] * fps)), min(round(bounds[1] * fps), last)
    size = float(end - start) / n
    return [int(start + size / 2 + np.round(size * i)) for i in range(n)]


def test_every_sampler_is_the_published_arithmetic_for_thousands_of_clips() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        total, n = draw.randint(1, 3000), draw.randint(1, 70)
        fps = draw.choice([1, 3, 10, 12.5, 15, 23.976, 24, 25, 29.97, 30, 30000 / 1001, 60])
        clip, seconds = Clip(total, fps), total / fps
        spread = np.linspace(0, total - 1, n, dtype=int).tolist()
        assert frame_indices(SamplingSpec(uniform=n), clip) == spread
        assert frame_indices(SamplingSpec(uniform=n, distinct=True), clip) == np.unique(spread).tolist()
        each = np.linspace(0, total - 1, min(n, max(1, int(seconds))), dtype=int).tolist()
        assert frame_indices(SamplingSpec(fps=1, max=n), clip) == each
        part = (draw.uniform(0, seconds / 2), draw.uniform(seconds / 2, seconds + 1))
        found = frame_indices(SamplingSpec(segments=n), clip, part)
        assert found == _published_tsn(n, fps, total - 1, 0, part), (total, fps, n, part)
        if int(seconds):
            k = min(n, int(seconds))
            edges = [int(int(seconds * fps) / k) * i for i in range(k)]
            assert frame_indices(SamplingSpec(left_edge=n), clip) == edges


@pytest.mark.parametrize("sampling", [{"uniform": 9}, {"fps": 2, "max": 9}, {"segments": 9}, {"left_edge": 9}], ids=str)
def test_no_part_leads_out_of_the_clip_or_backwards(sampling: dict[str, Any]) -> None:
    for frames in (1, 2, 7, 200):
        for part in (None, (0.0, 1e9), (5e8, 1e9), (1.0, 1.0), (3.0, 2.0), (-5.0, 2.0)):
            for first in (0, 1):
                found = frame_indices(SamplingSpec(**sampling), Clip(frames, 10.0, first=first), part)
                assert found == sorted(found) and found
                assert first <= found[0] <= found[-1] < first + frames


@pytest.mark.parametrize(
    ("sampling", "seconds", "expected"),
    [
        ({"uniform": 16}, 0.1, 16), ({"segments": 8}, 90.0, 8), ({"fps": 1}, 0.4, 1), ({"fps": 1}, 61.9, 61),
        ({"fps": 1, "max": 64}, 90.0, 64), ({"left_edge": 16}, 4.5, 4), ({"left_edge": 16}, 0.4, 1),
    ],
)  # fmt: skip
def test_the_number_of_frames_is_known_without_the_clip(sampling: Any, seconds: float, expected: int) -> None:
    assert frame_count(SamplingSpec(**sampling), seconds) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of uniform, fps, segments, left_edge, but this names none"),
        ({"uniform": 16, "fps": 1}, "but this has uniform and fps"),
        ({"uniform": 16, "max": 8}, "uniform is a number of frames itself. Leave `max` out"),
        ({"segments": 16, "distinct": True}, "leave it out with segments"),
        ({"uniform": 16, "middle": True}, "`middle` is for fps"),
        ({"fps": 1, "middle": True, "distinct": True}, "`middle` is for fps, without `distinct`"),
        ({"uniform": 0}, "greater than 0"),
        ({"fps": 0}, "greater than 0"),
    ],
)
def test_what_is_no_sampling_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingSpec(**fields)


def test_a_clip_of_nothing_is_refused() -> None:
    for wrong in ({"frames": 0, "fps": 25.0}, {"frames": 9, "fps": 0.0}, {"frames": 9, "fps": 1.0, "seconds": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            Clip(**wrong)


def test_a_sampling_dumps_what_it_says_and_no_more() -> None:
    assert SamplingSpec(fps=1, max=64).model_dump() == {"fps": 1, "max": 64}


@pytest.mark.parametrize("frames", [2, 7, 16, 400])
@pytest.mark.parametrize("wanted", [1, 2, 8, 16])
def test_shuffled_frames_are_the_same_ones_in_an_order_of_chance(frames: int, wanted: int) -> None:
    clip = Clip(frames, 4.0)
    chosen = frame_indices(SamplingSpec(uniform=wanted), clip)
    shuffled = baseline_indices("shuffled", chosen, clip)
    assert sorted(shuffled) == chosen
    assert shuffled == baseline_indices("shuffled", chosen, clip)
    assert (shuffled == chosen) == (len(set(chosen)) == 1)


def test_shuffled_frames_keep_nothing_of_their_order() -> None:
    rising = [
        later > earlier
        for frames in range(8, 200)
        for chosen in [frame_indices(SamplingSpec(uniform=8), Clip(frames, 4.0))]
        for shuffled in [baseline_indices("shuffled", chosen, Clip(frames, 4.0))]
        for earlier, later in pairwise(shuffled)
    ]
    assert 0.45 < sum(rising) / len(rising) < 0.55


def test_the_middle_frame_is_that_of_the_clip_or_of_its_part() -> None:
    clip = Clip(100, 10.0)
    assert baseline_indices("middle", [0, 99], clip) == [49]
    assert baseline_indices("middle", [20, 40], clip, (2.0, 4.0)) == [30]
    assert baseline_indices("middle", [0, 0], Clip(1, 10.0)) == [0]
