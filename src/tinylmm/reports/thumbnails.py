"""Images for a report: small ones as they are, large ones reduced; a bad one becomes a reason to show, not a crash."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from tinylmm.constants import MAX_PIXELS
from tinylmm.errors import DataError

SMALL_SIDE = 128
"""Up to this many pixels an image is kept pixel for pixel, and shown enlarged without blur."""
LARGE_SIDE = 360


class ThumbnailError(Exception):
    """An image cannot be shown; the message is for the page."""


@dataclass(frozen=True)
class Thumbnail:
    """An encoded image with its size in pixels."""

    uri: str
    width: int
    height: int
    crisp: bool
    """Whether to enlarge it with hard pixel edges."""


def find_image(record: dict[str, Any] | None) -> Path | Image.Image | None:
    """The image that a generation names: a file, or a cell of a parquet file, decoded.

    Raises:
        ThumbnailError: the cell cannot be read.
    """
    if record is None:
        return None
    if record.get("row") is None:
        return Path(record["path"])
    from tinylmm.evaluation.benchmarks.base import ImageRef

    try:
        return ImageRef(Path(record["path"]), record["row"], record["column"]).open()
    except DataError as error:
        raise ThumbnailError("image unreadable") from error


def load_image(path: Path | Image.Image | None) -> Image.Image:
    """Open an image as RGB, with no side above `LARGE_SIDE`.

    Raises:
        ThumbnailError: there is none, it is too large, or it cannot be decoded.
    """
    if path is None:
        raise ThumbnailError("no image")
    if isinstance(path, Image.Image):
        path.thumbnail((LARGE_SIDE, LARGE_SIDE))
        return path
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ThumbnailError(f"image too large ({image.width} × {image.height})")
            picture = image.convert("RGB")
    except FileNotFoundError as error:
        raise ThumbnailError("image missing") from error
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ThumbnailError("image unreadable") from error
    picture.thumbnail((LARGE_SIDE, LARGE_SIDE))
    return picture


def thumbnail(path: Path | Image.Image | None) -> Thumbnail:
    """Encode an image for a page: PNG for small ones (no loss), JPEG for photographs (a tenth of the size).

    Raises:
        ThumbnailError: as `load_image`.
    """
    picture = load_image(path)
    crisp = max(picture.size) <= SMALL_SIDE
    kind, options = ("png", {"optimize": True}) if crisp else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/{kind};base64,{data}", picture.width, picture.height, crisp)
