"""Parades of handwritten digits: which passes when, how a frame is drawn, and what can be said and asked about a clip.

A parade is some seconds of a square picture of 32 x 32 pixels with two lanes. Digits, scans as in `scenes.py`, cross a lane
from one side to the other, one after another, and none comes twice. A clip begins and ends anywhere in that stream: a digit
may be under way at either end, so that where one stands in a frame does not tell which way it goes, nor how many come before
or behind it. That is what makes the questions ask for time; `tests/unit/data/test_parades.py` holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from tinylmm.data.scenes import CORNER, DIGITS, SIZE, Question, Rng, Scans, warp

RATE = 4
"""Frames a second."""
LENGTHS = (9, 11, 13, 15, 17)
"""Frames that a clip may have: odd, so that the middle one is as far from the beginning as from the end."""
CROSSINGS = (8, 12)
"""Frames that the fastest and the slowest digit take from outside one side to outside the other."""
GAPS = (1, 4)
"""Frames between a digit's end and the next one's beginning in the same lane."""
LANES = ("top", "bottom")
COUNTS = (2, 3, 4)
"""Digits of a clip in all, equally often."""
LEAST_SEEN = 3
"""Frames that every digit is in the picture: of some, which are cut off by an end of the clip, even this many show no way."""
MARGIN = 2
"""Frames that lie between two events of which a question asks which is the first."""
GLIMPSES = (0.02, 0.3, 1.0)
"""How often a frame with no, one and two digits is taken: most frames of clips have one or none, which teach a tower less."""
CATEGORIES = ("direction", "leaves_first", "comes_after", "count")


@dataclass(frozen=True)
class Mover:
    """A digit that crosses a lane.

    Attributes:
        scan: its index among the scans of `Scans`.
        lane: index in `LANES`.
        right: whether it goes to the right.
        start: frame at which it is just outside the side that it comes from; below 0 if it is under way when the clip begins.
        frames: until it is just outside the other side.
    """

    digit: int
    scan: int
    lane: int
    right: bool
    start: int
    frames: int

    def left_edge(self, time: int) -> int:
        """Column of its first pixel at a frame, from -CORNER to SIZE."""
        gone = min(max(0.0, (time - self.start) / self.frames), 1.0)
        return round((SIZE + CORNER) * (gone if self.right else 1 - gone)) - CORNER

    def is_in(self, time: int) -> bool:
        """Whether more than half of it is in the picture."""
        return -CORNER // 2 < self.left_edge(time) < SIZE - CORNER // 2

    @property
    def direction(self) -> str:
        return "right" if self.right else "left"


@dataclass(frozen=True)
class Parade:
    """A clip of `frames` frames; its digits in the order in which they come, of two at once the top one first."""

    frames: int
    movers: tuple[Mover, ...]

    def seen(self, mover: Mover) -> list[int]:
        """Frames in which a digit is in the picture."""
        return [time for time in range(self.frames) if mover.is_in(time)]

    def leaves(self, mover: Mover) -> int | None:
        """First frame without it after it was there; None if it is there to the end."""
        last = self.seen(mover)[-1]
        return last + 1 if last + 1 < self.frames else None


def sample_parade(rng: Rng, scans: Scans) -> Parade:
    """Return a random clip, each number of digits equally often, of which the questions of `askable` can be asked."""
    count = int(rng.choice(COUNTS))
    while True:
        parade = _draw(rng, count)
        if parade is not None and _can_be_asked(parade):
            movers = tuple(replace(mover, scan=scans.draw(mover.digit, rng)) for mover in parade.movers)
            return Parade(parade.frames, movers)


def sample_glimpse(rng: Rng, scans: Scans) -> tuple[Parade, int]:
    """Return a random clip and a frame of it with two digits, or seldom one or none; about the clip nothing need be askable."""
    while True:
        parade = _draw(rng, int(rng.integers(COUNTS[0], COUNTS[-1] + 1)))
        if parade is None:
            continue
        time = int(rng.integers(parade.frames))
        shown = sum(mover.is_in(time) for mover in parade.movers)
        if rng.random() < GLIMPSES[shown]:
            movers = tuple(replace(mover, scan=scans.draw(mover.digit, rng)) for mover in parade.movers)
            return Parade(parade.frames, movers), time


def askable(parade: Parade) -> tuple[str, ...]:
    """The categories of which a question can be asked: of two digits, which comes after the other is no question of time."""
    return tuple(category for category in CATEGORIES if category != "comes_after" or len(parade.movers) > 2)


def _draw(rng: Rng, count: int) -> Parade | None:
    """A clip cut out of two endless lanes, its scans not chosen yet; None where another number of digits passes, or one too
    shortly to be told."""
    length = int(rng.choice(LENGTHS))
    spans = []
    for lane in range(len(LANES)):
        start = -int(rng.integers(CROSSINGS[1] + GAPS[1]))
        while start < length:
            frames = int(rng.integers(CROSSINGS[0], CROSSINGS[1] + 1))
            if start + frames > 1:
                spans.append((lane, start, frames))
            start += frames + int(rng.integers(GAPS[0], GAPS[1] + 1))
    if len(spans) < count or len(spans) > count + len(LANES):
        return None
    found: list[tuple[int, int, int, int, bool]] = []
    for (lane, start, frames), right in zip(spans, (rng.random(len(spans)) < 0.5).tolist(), strict=True):
        crossing = _crossing(frames, right)
        if start + crossing.noticed[-1] < 0 or start + crossing.noticed[0] >= length:
            continue
        first, last = max(0, start + crossing.inside[0]), min(length - 1, start + crossing.inside[-1])
        if last - first + 1 < LEAST_SEEN or len(found) == count:
            return None
        found.append((first, lane, start, frames, right))
    if len(found) != count:
        return None
    movers = [
        Mover(digit, 0, lane, right, start, frames)
        for digit, (_, lane, start, frames, right) in zip(
            rng.permutation(len(DIGITS))[:count].tolist(), sorted(found), strict=True
        )
    ]
    return Parade(length, tuple(movers))


@dataclass(frozen=True)
class _Crossing:
    """Frames, from a digit's start, in which it is in the picture, and in which enough of it is there to be noticed."""

    inside: range
    noticed: range


@cache
def _crossing(frames: int, right: bool) -> _Crossing:
    """What nearly all drawn clips are turned down for, so it is computed once."""
    mover = Mover(0, 0, 0, right, 0, frames)
    inside = [time for time in range(frames + 1) if mover.is_in(time)]
    noticed = [time for time in range(frames + 1) if -CORNER + 2 < mover.left_edge(time) < SIZE - 2]
    return _Crossing(range(inside[0], inside[-1] + 1), range(noticed[0], noticed[-1] + 1))


def _can_be_asked(parade: Parade) -> bool:
    """Whether it is clear what comes first, and no single frame tells."""
    first = first_to_leave(parade)
    if first is None or not _has_company(parade, first) or (len(parade.movers) > 2 and not _followed(parade)):
        return False
    if not _crossing_all(parade):
        return False
    # One in the middle frame, whatever the count: of many digits fewer clips would have none or two there than of few.
    return sum(mover.is_in((parade.frames - 1) // 2) for mover in parade.movers) == 1


def first_to_leave(parade: Parade) -> Mover | None:
    """The digit that leaves before all others; None where two leave at about the same time, or none does."""
    leaving = sorted(
        ((time, mover) for mover in parade.movers if (time := parade.leaves(mover)) is not None),
        key=lambda pair: pair[0],
    )
    if not leaving or (len(leaving) > 1 and leaving[1][0] - leaving[0][0] < MARGIN):
        return None
    return leaving[0][1]


def _has_company(parade: Parade, leaver: Mover) -> bool:
    """Whether another digit is in the picture as one leaves it, so that being there alone does not tell who is the first."""
    last = parade.seen(leaver)[-1]
    return any(mover.is_in(last) for mover in parade.movers if mover is not leaver)


def _crossing_all(parade: Parade) -> list[Mover]:
    """Digits that come and go within the clip: at least two of eight evenly spread frames show each, so that its way can be
    seen, and the first and the last frame have none of them, so that neither tells."""
    return [mover for mover in parade.movers if parade.seen(mover)[0] > 0 and parade.leaves(mover) is not None]


def _followed(parade: Parade) -> list[tuple[Mover, Mover]]:
    """Digits with the one that comes next, where it is clear which."""
    first = [parade.seen(mover)[0] for mover in parade.movers]
    return [
        (mover, parade.movers[number + 1])
        for number, mover in enumerate(parade.movers[:-1])
        if first[number + 1] - first[number] >= MARGIN
        and (number + 2 == len(first) or first[number + 2] - first[number + 1] >= MARGIN)
    ]


# ---------------------------------------------------------------------------------------------------- drawing


def render(parade: Parade, scans: Scans, rng: Rng, times: Sequence[int] | None = None) -> np.ndarray:
    """Draw a clip, or of all its frames those at `times`.

    Returns:
        (frames, SIZE, SIZE, 3) uint8, RGB.
    """
    times = range(parade.frames) if times is None else times
    background = rng.uniform(5, 60) + rng.uniform(-10, 10, size=3)
    inks = [warp(scans.images[mover.scan], rng)[..., None] for mover in parade.movers]
    colours = [rng.uniform(200, 250) + rng.uniform(-10, 5, size=3) for _ in parade.movers]
    clip = np.empty((len(times), SIZE, SIZE, 3), np.uint8)
    for number, time in enumerate(times):
        # Wider than the picture by a digit on either side.
        canvas = background + rng.normal(0, 2, size=(SIZE, SIZE + 2 * CORNER, 1))
        for mover, ink, colour in zip(parade.movers, inks, colours, strict=True):
            row, column = CORNER * mover.lane, mover.left_edge(time) + CORNER
            place = canvas[row : row + CORNER, column : column + CORNER]
            place += ink * (colour - place)
        clip[number] = np.clip(canvas[:, CORNER:-CORNER], 0, 255).round()
    return clip


# ---------------------------------------------------------------------------------------------------- what can be said


def moves(parade: Parade) -> str:
    """Return the digits in the order in which they come, each with its way: `3 right, 7 left`."""
    return ", ".join(f"{mover.digit} {mover.direction}" for mover in parade.movers)


def frame_caption(parade: Parade, time: int) -> str:
    """Return what one frame shows, in words: `3 top left, 7 bottom middle`; `nothing` of an empty one."""
    return ", ".join(_placed(mover, time) for mover in parade.movers if mover.is_in(time)) or "nothing"


def description(parade: Parade, steps: int) -> str:
    """Return a clip in words for text-only training: so many of its frames, evenly spread, one after another."""
    times = np.linspace(0, parade.frames - 1, steps).astype(int)
    return "; ".join(frame_caption(parade, int(time)) for time in times) + "."


def _placed(mover: Mover, time: int) -> str:
    centre = mover.left_edge(time) + CORNER // 2
    side = "left" if centre < SIZE / 3 else "right" if centre > SIZE * 2 / 3 else "middle"
    return f"{mover.digit} {LANES[mover.lane]} {side}"


# ---------------------------------------------------------------------------------------------------- what can be asked


def ask(category: str, parade: Parade, rng: Rng) -> Question:
    """Return a random question of `category` (one of `CATEGORIES`) about `parade`."""
    count = len(parade.movers)
    match category:
        case "direction":
            crossing = _crossing_all(parade)
            mover = crossing[rng.integers(len(crossing))]
            return Question(category, f"does the {mover.digit} move left or right?", mover.direction, 2)
        case "leaves_first":
            first = first_to_leave(parade)
            assert first is not None, "sample_parade leaves no other clips"
            return Question(category, "which digit leaves first?", str(first.digit), count)
        case "comes_after":
            pairs = _followed(parade)
            before, after = pairs[rng.integers(len(pairs))]
            return Question(category, f"which digit comes in after the {before.digit}?", str(after.digit), count - 1)
        case "count":
            return Question(category, "how many digits in all?", str(count), len(COUNTS))
    raise ValueError(f"unknown category {category!r}; there are {CATEGORIES}")
