"""Images from untrusted data sets: safe paths and safe decoding.

Few formats, a pixel limit read from the header before anything is decoded, and truncated files refused: a half-decoded
image would train in silence. Every refusal is a `DataError` that names the file.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tinylmm.constants import MAX_PIXELS
from tinylmm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""GIF because OCR-VQA in LLaVA's mix has some; of an animation, the first frame counts."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, MemoryError, *_BOMBS)
"""What Pillow's readers raise on damaged files of FORMATS."""

MAX_SCANNED = 10 * MAX_PIXELS
"""Pixels of a JPEG times its scans: each scan costs as much time as the whole image, and a file may have hundreds."""

_ORIENTATION = 0x0112
"""EXIF's tag of how to turn an image for display."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def safe_path(root: Path, relative: str, follow_links: bool = False, what: str = "image") -> Path:
    """Return the existing regular file at `root/relative`, every link followed, that lies inside `root`.

    Args:
        relative: a path below `root`; an absolute one counts if it leads there.
        follow_links: links below `root` may lead out of it; `..` may not.
        what: it is, in messages.

    Raises:
        DataError: the path leads out of `root` (by `..` or a link), or names no regular file.
    """
    if not relative or "\0" in relative:
        raise DataError(f"{what} path {relative!r}: must be relative to {root}, and not empty. Correct the record.")
    try:
        resolved_root = root.resolve(strict=True)
        path = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{what} '{relative}': not found under {root} ({getattr(error, 'strerror', None) or error}). "
            "Put the file there, or correct the record or the source's `images`."
        ) from error
    inside = path.is_relative_to(resolved_root) or (follow_links and not _climbs(root, relative))
    if not inside:
        raise DataError(
            f"{what} '{relative}': leads out of the image folder {root}, to {path}. Only files inside it are read: move "
            "the file there, set the source's `images` to a folder around both, or, where a link in the folder leads "
            "there on purpose, set the source's follow_links=true."
        )
    if not path.is_file():
        raise DataError(f"{what} '{relative}': {path} is no regular file. Correct the record.")
    return path


def relative_name(root: Path, name: str) -> str:
    """Return an absolute path inside `root` as a path below it, and any other name as it is."""
    for folder in (root.absolute(), root.resolve()):
        if Path(name).is_relative_to(folder) and not _climbs(folder, name):
            return Path(name).relative_to(folder).as_posix()
    return name


def _climbs(root: Path, relative: str) -> bool:
    """Whether the words of a path themselves lead out of `root`, links or not."""
    folder = os.path.abspath(root)  # noqa: PTH100 - pathlib would follow the links
    return not Path(os.path.abspath(root / relative)).is_relative_to(folder)  # noqa: PTH100


def open_image(path: Path | BinaryIO, data: bytes | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file (or the bytes of one) completely, as RGB.

    Args:
        path: a file, or an open binary one.
        data: decode this instead; `path` then only names it in messages.
        upright: turn it as its camera says.

    Raises:
        DataError: not one of FORMATS, more than MAX_PIXELS or MAX_SCANNED, damaged, or cut short.
    """

    def decoded(image: Image.Image) -> Image.Image:
        turn = _TURNS.get(_orientation(image)) if upright else None
        return _rgb(image) if turn is None else _rgb(image).transpose(turn)

    return _decode(path, data, decoded)


def as_rgb(image: Image.Image, what: str = "the image") -> Image.Image:
    """An image that somebody else opened, as RGB, under the same limit.

    Raises:
        DataError: it has more than MAX_PIXELS.
    """
    _check_size(what, *image.size)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Of grey values of 16 bits, the 8 upper bits are kept: Pillow's own conversion makes all above 255 white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_image(path: Path | BinaryIO) -> None:
    """Raise what `open_image` would raise, but decode JPEG at an eighth of its size (all its data is still read)."""

    def decoded(image: Image.Image) -> Image.Image:
        if image.format == "JPEG":
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        return image.convert("RGB")

    _decode(path, None, decoded)


def image_size(path: Path | BinaryIO, upright: bool = False, data: bytes | None = None) -> tuple[int, int]:
    """Width and height of an image file (or of the bytes of one) in pixels, from its header alone.

    Args:
        upright: the size is that of the turned image.
        data: read this instead; `path` then only names it in messages.

    Raises:
        DataError: not one of FORMATS, or more than MAX_PIXELS.
    """
    return image_header(path, upright, data)[0]


def image_header(
    path: Path | BinaryIO, upright: bool = False, data: bytes | None = None
) -> tuple[tuple[int, int], str, bool]:
    """Size in pixels, format, and whether the camera says to turn the image.

    Args: as `image_size`.

    Raises:
        DataError: as `image_size`.
    """
    with _open_header(path, data) as image:
        orientation = _orientation(image)
        size = image.size[::-1] if upright and orientation > 4 else image.size
        return size, str(image.format), orientation in _TURNS


def _decode(path: Path | BinaryIO, data: bytes | None, decoded: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with _open_header(path, data) as image:
        try:
            _check_scans(path, image)
            return decoded(image)
        except DECODE_ERRORS as error:
            if not _is_text_limit(error):
                raise _damaged(path, error) from error
    return _decode(path, _without_text(_content(path, data)), decoded)  # texts may stand behind the pixels


def _open_header(path: Path | BinaryIO, data: bytes | None = None) -> Image.Image:
    """Open without decoding, and refuse by format and size."""
    try:
        image = Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except _BOMBS as error:
        raise DataError(
            f"{path}: image is too large ({error}); at most {MAX_PIXELS:,} pixels. Scale it down."
        ) from error
    except DECODE_ERRORS as error:
        if _is_text_limit(error):
            return _open_header(path, _without_text(_content(path, data)))
        raise DataError(
            f"{path}: not a readable {', '.join(FORMATS)} image ({type(error).__name__}). Fetch or convert it again."
        ) from error
    try:
        _check_size(str(path), *image.size)
    except DataError:
        image.close()
        raise
    return image


def _is_text_limit(error: BaseException) -> bool:
    """Whether Pillow stopped at a PNG's texts or colour profile, of which it unpacks no more than a megabyte each."""
    return "MAX_TEXT" in str(error)


def _content(path: Path | BinaryIO, data: bytes | None) -> bytes:
    if data is not None:
        return data
    if isinstance(path, Path):
        return path.read_bytes()
    path.seek(0)
    return path.read()


def _without_text(png: bytes) -> bytes:
    """A PNG without the chunks that hold packed texts and colour profiles; its pixels need none of them."""
    kept, place = [png[:8]], 8
    while place + 8 <= len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"zTXt", b"iTXt", b"tEXt", b"iCCP"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _check_scans(path: Path | BinaryIO, image: Image.Image) -> None:
    """Refuse a JPEG that would take minutes: no byte pair FF DA stands in its packed data, only where a scan begins."""
    file: BinaryIO | None = getattr(image, "fp", None)
    if image.format != "JPEG" or file is None:
        return
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    work = scans * image.width * image.height
    if work > MAX_SCANNED:
        raise DataError(
            f"{path}: a JPEG of {scans} scans of {image.width} x {image.height} pixels would take too long to decode; at "
            f"most {MAX_SCANNED:,} pixels times scans. Save it again."
        )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (as stored) to 8; 1 where there is none that can be read, or it is behind a PNG's pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (*DECODE_ERRORS, KeyError, TypeError):  # broken EXIF says nothing of how to turn the image
        return 1
    return found if found in _TURNS else 1


def _check_size(what: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise DataError(f"{what}: image is too large ({size}); at most {MAX_PIXELS:,} pixels. Scale it down.")


def _damaged(path: Path | BinaryIO, error: BaseException) -> DataError:
    return DataError(f"{path}: image is damaged or cut short ({type(error).__name__}: {error}). Fetch it again.")
