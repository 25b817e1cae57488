"""Images for a report: small ones as they are, large ones reduced; a bad one becomes a reason to show, not a crash."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.images import open_image_ref

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


def load_image(ref: ImageRef | None) -> Image.Image:
    """Open an image by the rules that evaluation opens it by, as RGB, with no side above `LARGE_SIDE`.

    Raises:
        ThumbnailError: there is none, it is too large, or it cannot be decoded.
    """
    if ref is None:
        raise ThumbnailError("no image")
    if not ref.path.is_file():
        raise ThumbnailError("image missing")
    try:
        picture = open_image_ref(ref)
    except DataError as error:
        raise ThumbnailError(str(error)) from error
    picture.thumbnail((LARGE_SIDE, LARGE_SIDE))
    return picture


def thumbnail(ref: ImageRef | None) -> Thumbnail:
    """Encode an image for a page: PNG for small ones (no loss), JPEG for photographs (a tenth of the size).

    Raises:
        ThumbnailError: as `load_image`.
    """
    picture = load_image(ref)
    crisp = max(picture.size) <= SMALL_SIDE
    kind, options = ("png", {"optimize": True}) if crisp else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/{kind};base64,{data}", picture.width, picture.height, crisp)
