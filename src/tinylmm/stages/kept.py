"""The pixel cache of a training: whether there is one, its images' bytes read through it (`store/pixels.py`), and how well."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from tinylmm.planning.specs import TrainStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.seen import Features, SeenImages
from tinylmm.store.layout import PIXELS_USED_FILE, StoreLayout
from tinylmm.store.pixels import KEY_BYTES, PixelShelf, Views
from tinylmm.training.features import GIB, note_used
from tinylmm.training.ranks import from_rank_zero, rank

log = logging.getLogger(__name__)

PIXELS_VERSION = 1
"""Raised by hand when a change of code changes what a transform makes of an image; older bytes are then not read again."""


def open_pixels(job: StageJob[TrainStage], seen: SeenImages, names: Sequence[str], passes: float) -> PixelShelf | None:
    """Let a training's images be read through the store's pixel cache, if its launch says so. Every rank must call it.

    `auto` does where images are read more than once and all of them have room, or earlier trainings have kept some.

    Args:
        seen: reads through the cache from now on.
        names: distinct images and videos.
        passes: how often each is read.

    Returns:
        the shelf, which counts what is read; None where there is none.
    """
    launch = job.settings.launch
    if launch.cache_pixels is False or not names:
        return None
    limit = int(launch.cache_pixels_gib * GIB)
    about = {"version": PIXELS_VERSION, "pillow": version("pillow"), **seen.transform.geometry}
    key = _digest(about).hex()
    shelf = PixelShelf(StoreLayout(job.store).pixels, key, limit, about)
    exists, taken = from_rank_zero((shelf.exists, shelf.taken()) if rank() == 0 else None)
    needs = sum(map(seen.views, names)) * 3 * seen.transform.size**2
    if launch.cache_pixels == "auto" and not exists and (passes <= 1 or taken + needs > limit):
        if passes > 1:
            log.info(
                "transformed images would take %.1f GiB, and launch.cache_pixels_gib leaves %.1f: decoded at each epoch",
                needs / GIB,
                max(0, limit - taken) / GIB,
            )
        return None
    if rank() == 0:
        note_used(job.folder, [key], PIXELS_USED_FILE)
    log.info("transformed images are kept in %s: %.1f GiB at most of this training", shelf.folder, needs / GIB)
    seen.bytes_of = ThroughShelf(shelf, seen)
    return shelf


class ThroughShelf:
    """`SeenImages.decode` with a shelf between it and the files."""

    def __init__(self, shelf: PixelShelf, seen: SeenImages) -> None:
        self.shelf = shelf
        self.seen = seen
        self._decoder = version("av") if seen.folders.have_clips else ""

    def __call__(self, name: str) -> np.ndarray:
        """What `decode` gives of an image or a video, to the byte.

        Raises:
            DataError: as `decode`.
        """
        seen, clip = self.seen, self.seen.frames(name) > 0
        stamp = _digest([seen.stamp(name), self._decoder] if clip else seen.stamp(name))
        file: list[bytes] = []

        def content() -> bytes:
            if clip:  # a video is large, and its stamp has the frames that are shown
                return stamp
            file.append(seen.folders.content(name))
            return hashlib.sha256(file[0] + bytes([seen.folders.upright(name)])).digest()[:KEY_BYTES]

        def make() -> Views:
            made = seen.decode(name, file[0] if file else None)
            return Views(made.data.cast("B"), len(made) if made.ndim == 4 else 0)

        found = self.shelf.read(stamp, content, make)
        shape = (3, seen.transform.size, seen.transform.size)
        return np.frombuffer(found.data, np.uint8).reshape((found.views, *shape) if found.views else shape)


def pixels_summary(shelf: PixelShelf | None, reads: float, hits: float) -> dict[str, Any]:
    """What a training's summary says of the images that it read through a shelf, over all ranks."""
    if shelf is None or not reads:
        return {}
    size = sum(path.stat().st_size for path in shelf.folder.glob("*")) if shelf.exists else 0
    return {"pixels": {"reads": int(reads), "hit_rate": round(hits / reads, 4), "disk_bytes": size}}


def features_summary(cache: Features | None) -> dict[str, Any]:
    """What a training's summary says of the features that it read: of images and videos, how many were in the store."""
    if cache is None:
        return {}
    kept = {"images": len(cache), "hit_rate": round(1 - cache.computed / max(len(cache), 1), 4)}
    return {"features": kept | {"disk_bytes": cache.disk_bytes}}


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:KEY_BYTES]
