"""Videos that come as folders of their frames, `00001.jpg`, `00002.jpg`, ... as MVBench has TVQA's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tinylmm.data.frame_sampling import Clip
from tinylmm.data.images import open_image
from tinylmm.errors import DataError

FIRST = 1
"""Number of the first frame."""


def folder_clip(folder: Path, fps: float) -> Clip:
    """Return a folder of frames as samplers see it.

    Raises:
        DataError: it holds none, or a number is missing between its first and last one.
    """
    numbers = sorted(int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdecimal())
    if not numbers:
        raise DataError(f"{folder}: holds no frame 00001.jpg, 00002.jpg, .... Fetch it again.")
    wrong = next((at for at, number in enumerate(numbers, FIRST) if at != number), None)
    if wrong is not None:
        raise DataError(f"{folder}: frame {_name(wrong)} is missing. Fetch it again.")
    return Clip(len(numbers), fps, first=FIRST)


def folder_frames(folder: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """Return frames in the order in which they are asked for.

    Raises:
        DataError: a frame is missing or no image.
    """
    return [open_image(folder / _name(number)) for number in numbers]


def _name(number: int) -> str:
    return f"{number:05d}.jpg"
