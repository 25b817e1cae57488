"""Scenes of handwritten digits: what is in one, how it is drawn, and what can be said and asked about it.

A scene is a square picture of 32 x 32 pixels with one to three digits in its four corners. Each digit is a real scan of
8 x 8 pixels from scikit-learn's bundled set (the test part of UCI "Optical Recognition of Handwritten Digits"), moved,
turned, stretched and coloured a little differently every time. Digits and colours do not repeat within a scene, so that
a digit, a colour and a place each name one object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIZE = 32
"""Height and width of a scene in pixels."""
CORNER = SIZE // 2
"""Height and width of a corner in pixels."""
COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 250),
    "yellow": (245, 215, 50),
    "purple": (190, 70, 220),
    "white": (240, 240, 240),
}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
"""Name -> (row, column) of the corner, in reading order."""
DIGITS = tuple(range(10))
CATEGORIES = ("digit", "colour", "count", "yesno", "number", "choice")
NUM_OPTIONS = 4
COUNT_SHARES = (0.4, 0.4, 0.2)
"""How often a scene has one, two and three digits."""
MAX_PAIRS = 10
"""Sentences of `facts` at most; a scene of three digits has twelve."""
TRAIN_SHARE = 0.8
"""The scans are ordered by writer, so that a contiguous cut keeps the last writers out of training."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Glyph:
    """One digit of a scene; `scan` is its index among the scans of `Scans`."""

    digit: int
    colour: str
    place: str
    scan: int


Scene = tuple[Glyph, ...]
"""The glyphs of a scene in reading order."""


@dataclass(frozen=True)
class Question:
    """A question with its answer; `options` is the number of answers that a uniform guesser would choose from."""

    category: str
    text: str
    answer: str
    options: int


class Scans:
    """The scans of one split, by digit."""

    def __init__(self, split: str) -> None:
        """Take the scans of `split`: `train` (the first 80 %) or `held_out` (the writers after them)."""
        images, labels = _all_scans()
        cut = int(len(labels) * TRAIN_SHARE)
        indices = np.arange(cut) if split == "train" else np.arange(cut, len(labels))
        self.images = images
        self._by_digit = [indices[labels[indices] == digit] for digit in DIGITS]

    def draw(self, digit: int, rng: Rng) -> int:
        """Return the index of a random scan of `digit`."""
        return int(rng.choice(self._by_digit[digit]))


@cache
def _all_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scans (N, 10, 10) uint8 with a border of one empty pixel, and their labels (N,)."""
    from sklearn.datasets import load_digits  # imported here because it takes a second

    digits = load_digits()
    ink = np.clip(digits.images * (255 / 16), 0, 255).round().astype(np.uint8)
    return np.pad(ink, ((0, 0), (1, 1), (1, 1))), digits.target


def sample_scene(rng: Rng, scans: Scans) -> Scene:
    """Return a random scene: one to three digits as often as `COUNT_SHARES` says, everything else uniform."""
    count = int(rng.choice(3, p=COUNT_SHARES)) + 1
    digits = rng.permutation(10)[:count]
    colours = rng.permutation(list(COLOURS))[:count]
    places = sorted(rng.permutation(len(PLACES))[:count])
    names = list(PLACES)
    return tuple(
        Glyph(int(digit), str(colour), names[place], scans.draw(int(digit), rng))
        for digit, colour, place in zip(digits, colours, places, strict=True)
    )


def render(scene: Scene, scans: Scans, rng: Rng) -> np.ndarray:
    """Draw a scene.

    Returns:
        (SIZE, SIZE, 3) uint8, RGB.
    """
    background = rng.uniform(5, 65) + rng.uniform(-12, 12, size=3)
    canvas = background + rng.normal(0, 5, size=(SIZE, SIZE, 1))
    for glyph in scene:
        ink = warp(scans.images[glyph.scan], rng)[..., None]
        colour = np.array(COLOURS[glyph.colour]) * rng.uniform(0.82, 1.0) + rng.uniform(-10, 10, size=3)
        row, column = (CORNER * index for index in PLACES[glyph.place])
        corner = canvas[row : row + CORNER, column : column + CORNER]
        corner += ink * (colour - corner)
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def warp(scan: np.ndarray, rng: Rng) -> np.ndarray:
    """Enlarge a scan (10, 10) to a corner, a little turned, sheared, stretched and moved; values 0 to 1."""
    angle, shear = rng.uniform(-0.08, 0.08), rng.uniform(-0.06, 0.06)
    scale_x, scale_y = rng.uniform(1.5, 1.65, size=2)
    cos, sin = math.cos(angle), math.sin(angle)
    # Rows of the inverse map, from a pixel of the corner to a point of the scan, about the two centres.
    a, b = cos / scale_x, (sin + shear) / scale_x
    d, e = -sin / scale_y, cos / scale_y
    move_x, move_y = rng.uniform(-0.7, 0.7, size=2) + CORNER / 2
    half = scan.shape[0] / 2
    matrix = (a, b, half - a * move_x - b * move_y, d, e, half - d * move_x - e * move_y)
    corner = Image.fromarray(scan).transform(
        (CORNER, CORNER), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.minimum(np.asarray(corner, dtype=np.float64) / 230, 1.0)


# ---------------------------------------------------------------------------------------------------- what can be said


def caption(scene: Scene) -> str:
    """Return the full caption, in reading order: `a red 3 top left and a blue 7 bottom right`."""
    return _join([f"a {glyph.colour} {glyph.digit} {glyph.place}" for glyph in scene])


def short_caption(scene: Scene, rng: Rng) -> str:
    """Return a caption that may leave out colours, places or both, as captions do.

    For contrastive learning it matters that they do: colours and places alone tell most scenes apart, and a tower that only
    ever met full captions would be slow to look at the digits themselves.
    """
    wordings = (
        caption(scene),
        _join([f"a {glyph.colour} {glyph.digit}" for glyph in scene]),
        _join([f"a {glyph.digit} {glyph.place}" for glyph in scene]),
        _join([f"a {glyph.digit}" for glyph in scene]),
    )
    return wordings[rng.integers(len(wordings))]


def dense_caption(scene: Scene) -> str:
    """Return a caption that says of every corner what is in it, and how many digits there are."""
    by_place = {glyph.place: glyph for glyph in scene}
    corners = [
        f"{place} is a {by_place[place].colour} {by_place[place].digit}." if place in by_place else f"{place} is empty."
        for place in PLACES
    ]
    digits = "1 digit" if len(scene) == 1 else f"{len(scene)} digits"
    return " ".join([f"there are {digits} in the picture.", *corners, f"in order they read {_number(scene)}."])


def description(scene: Scene, rng: Rng) -> str:
    """Return a scene in words for text-only training: one of several wordings, objects in any order."""
    shuffled = tuple(scene[index] for index in rng.permutation(len(scene)))
    wordings = (
        f"there is {caption(shuffled)}.",
        " ".join(f"{glyph.place}: {glyph.colour} {glyph.digit}." for glyph in shuffled),
        " ".join(f"the {glyph.digit} {glyph.place} is {glyph.colour}." for glyph in shuffled),
    )
    return dense_caption(scene) if rng.random() < 0.1 else wordings[rng.integers(len(wordings))]


def pairs(scene: Scene, rng: Rng) -> str:
    """Return properties in pairs, each beside one that it belongs to: `red 3, top left red, 7 blue`.

    The second word of a pair is a look-up whose key is the word just read: the simplest that there is. Models of this size
    learn it within a few hundred steps, and questions, whose key lies further back, only on top of it.
    """
    found = [
        f"{key} {value}"
        for glyph in scene
        for key, value in (
            (glyph.colour, glyph.digit),
            (glyph.digit, glyph.colour),
            (glyph.place, glyph.digit),
            (glyph.place, glyph.colour),
        )
    ]
    return ", ".join(found[index] for index in rng.permutation(len(found))[:MAX_PAIRS])


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _number(scene: Scene) -> str:
    return " ".join(str(glyph.digit) for glyph in scene)


# ---------------------------------------------------------------------------------------------------- what can be asked


def ask(category: str, scene: Scene, rng: Rng) -> Question:
    """Return a random question of `category` (one of `CATEGORIES`) about `scene`."""
    glyph = scene[rng.integers(len(scene))]
    match category:
        case "digit":
            return Question(category, f"what digit is {_which(glyph, rng)}?", str(glyph.digit), len(DIGITS))
        case "colour":
            thing = f"the {glyph.digit}" if rng.random() < 0.5 else f"the digit {glyph.place}"
            return Question(category, f"what colour is {thing}?", glyph.colour, len(COLOURS))
        case "count":
            return Question(category, "how many digits are there?", str(len(scene)), 3)
        case "yesno":
            return _ask_yes_or_no(scene, glyph, rng)
        case "number":
            return Question(category, "read the digits in order.", _number(scene), 10 ** len(scene))
        case "choice":
            return _ask_choice(scene, glyph, rng)
    raise ValueError(f"unknown category {category!r}; there are {CATEGORIES}")


def _which(glyph: Glyph, rng: Rng) -> str:
    return glyph.colour if rng.random() < 0.5 else glyph.place


def _ask_yes_or_no(scene: Scene, glyph: Glyph, rng: Rng) -> Question:
    """Both answers equally often, whatever is asked for, so that the question alone tells nothing."""
    truth = rng.random() < 0.5
    if rng.random() < 0.6:
        absent = [digit for digit in DIGITS if digit not in {other.digit for other in scene}]
        thing = f"a {glyph.digit if truth else absent[rng.integers(len(absent))]}"
    else:
        unused = [colour for colour in COLOURS if colour not in {other.colour for other in scene}]
        thing = f"a {glyph.colour if truth else unused[rng.integers(len(unused))]} digit"
    return Question("yesno", f"is there {thing}?", "yes" if truth else "no", 2)


def _ask_choice(scene: Scene, glyph: Glyph, rng: Rng) -> Question:
    """Four digits to choose from; the scene's other digits come first as wrong ones, so that presence is no hint."""
    others = [other.digit for other in scene if other is not glyph]
    absent = [digit for digit in DIGITS if digit != glyph.digit and digit not in others]
    options = [glyph.digit, *others, *(absent[index] for index in rng.permutation(len(absent)))][:NUM_OPTIONS]
    *listed, last = (str(options[index]) for index in rng.permutation(NUM_OPTIONS))
    text = f"which is {_which(glyph, rng)}: {', '.join(listed)} or {last}?"
    return Question("choice", text, str(glyph.digit), NUM_OPTIONS)
