"""How images are named: a path below the source's image folder, or `embedded:<hash>` for bytes that a record carries.

A video is named `video:` and its path below that folder.
Embedded images (parquet cells, base64 data URLs) are written to files by the `images` stage, each content once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylmm.data.formats import RecordFaultError, is_broken, shown

EMBEDDED = "embedded:"
VIDEO = "video:"
MAX_EMBEDDED_BYTES = 32_000_000
"""An embedded image of more bytes is refused before it is decoded."""
_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def name_images(images: Sequence[Any]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Return the names of a record's images in order, and the bytes of those that are embedded.

    Raises:
        RecordFaultError: an image is neither a path nor embedded bytes, is too large, or lies on the network.
    """
    names: list[str] = []
    embedded: dict[str, bytes] = {}
    for number, image in enumerate(images):
        if isinstance(image, dict) and "video" in image:
            names.append(VIDEO + _video_path(number, image["video"]))
            continue
        data = _bytes(number, image)
        if data is None:
            names.append(_path(number, image.get("path") if isinstance(image, dict) else image))
            continue
        if len(data) > MAX_EMBEDDED_BYTES:
            raise RecordFaultError(f"image {number} has {len(data):,} bytes, more than {MAX_EMBEDDED_BYTES:,}")
        names.append(EMBEDDED + hashlib.sha256(data).hexdigest()[:40])
        embedded[names[-1]] = data
    return tuple(names), embedded


def is_embedded(name: str) -> bool:
    """Whether a name stands for bytes that a record carried."""
    return name.startswith(EMBEDDED)


def video_path(name: str) -> str | None:
    """The path that a video is named by; None for the name of an image."""
    return name.removeprefix(VIDEO) if name.startswith(VIDEO) else None


def embedded_path(folder: Path, name: str) -> Path:
    """Where the images stage keeps an embedded image below `folder`."""
    digest = name.removeprefix(EMBEDDED)
    return folder / digest[:2] / digest[2:]


def _bytes(number: int, image: Any) -> bytes | None:
    """The bytes of an embedded image, or None for a path."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict) and {"bytes", "path"} & image.keys():
        data = image.get("bytes")
        if data is None or isinstance(data, bytes):
            return data
    if not isinstance(image, str) or not image.startswith("data:"):
        return None
    match = _DATA_URL.match(image)
    if match is None:
        raise RecordFaultError(f"image {number} is a data URL of another kind than data:image/...;base64,")
    if len(image) > MAX_EMBEDDED_BYTES * 4 // 3 + 100:
        raise RecordFaultError(f"image {number} is a data URL of more than {MAX_EMBEDDED_BYTES:,} bytes")
    try:
        return base64.b64decode(image[match.end() :], validate=True)
    except binascii.Error as error:
        raise RecordFaultError(f"image {number} is a data URL with broken base64 ({error})") from error


def _video_path(number: int, video: Any) -> str:
    held = isinstance(video, dict) and {"bytes", "path"} & video.keys()
    if isinstance(video, bytes) or (held and video.get("bytes") is not None) or str(video)[:5] == "data:":
        raise RecordFaultError(f"video {number} is embedded in the record: write it to a file, and name that")
    return _path(number, video.get("path") if held else video, "video")


def _path(number: int, path: Any, what: str = "image") -> str:
    if not isinstance(path, str) or not path:
        raise RecordFaultError(f"`{what}` must be a path or a list of paths, but holds {shown(path)}")
    if is_broken(path):
        raise RecordFaultError(f"the path of {what} {number} holds half a character (a lone surrogate escape)")
    if _ADDRESS.match(path):
        raise RecordFaultError(
            f"{what} {number} is at an address ({path[:80]}), and nothing is fetched while training: "
            "download it, and name the file by its path below the source's image folder"
        )
    if path.startswith((EMBEDDED, VIDEO)):
        raise RecordFaultError(
            f"{what} {number} is called {shown(path)}: names that begin with '{EMBEDDED}' or '{VIDEO}' are reserved"
        )
    return path
