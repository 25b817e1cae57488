"""Features of a frozen tower, computed once an image and memory-mapped from disk.

The cache changes no result: features are stored in the tower's own dtype and computed in fixed chunks, so every epoch, rank,
resume and run reads the same bytes. It lies under store/features/<key>, keyed by the tower's weights, the image transform, the
images themselves and the code that computes, and is shared by every run that trains on the same images with the same frozen
tower. Each stage that reads it says so in its own folder, which is how `tinylmm store gc` knows what is still in use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylmm.config.cores import usable_cores
from tinylmm.errors import StoppedError
from tinylmm.models.vision import HFVisionTower, encode_images
from tinylmm.stop import require_claim, stop_requested
from tinylmm.store import integrity
from tinylmm.store.disk import reserve
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import FEATURES_USED_FILE
from tinylmm.training.ranks import any_rank, barrier, rank, world_size

log = logging.getLogger(__name__)

FEATURES_VERSION = 1
"""Raised by hand when a change of code changes what a tower makes of an image; older features are then computed again."""
COMPUTED_BY = ("torch", "transformers", "pillow")
"""Libraries whose release may change a feature's last bits."""
CHUNK_IMAGES = 64
FEATURES_FILE = "features.bin"
PART = "features.part"
"""In the work folder: features on their way."""
GIB = 1024**3


@dataclass(frozen=True)
class FeatureCache:
    """Features of N images of V views in all: one an image, or its tiles.

    Attributes:
        features: (V, P, Dv), memory-mapped, read only.
        index: image path as written in the data -> its rows.
        computed: images whose features were not there before.
    """

    features: Tensor
    index: dict[str, range]
    computed: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def disk_bytes(self) -> int:
        """Size of the features' file."""
        return self.features.numel() * self.features.element_size()

    def __call__(self, images: Sequence[str]) -> Tensor:
        """Return the views of `images` one behind the other: (len(images), P, Dv), or more where they are tiled."""
        return self.features[torch.tensor([row for image in images for row in self.index[image]])]


def estimate_gib(tower: HFVisionTower, num_views: int) -> float:
    """Size on disk of the features of so many views, GiB; an image is one view, or as many as it has tiles."""
    bytes_each = next(tower.parameters()).element_size()
    return num_views * tower.num_tokens * tower.hidden_size * bytes_each / GIB


def open_features(
    tower: HFVisionTower,
    images: Sequence[str],
    load: Callable[[str], Tensor],
    stamp: Callable[[str], object],
    cache_root: Path,
    scratch: Path,
    description: dict[str, object],
    views: Callable[[str], int] | None = None,
) -> FeatureCache:
    """Return the features of `images`, computing them first where no valid cache is on disk. Every rank must call it.

    Args:
        tower: frozen, already on its device.
        images: distinct image names, in a fixed order.
        load: name -> normalised pixels (3, H, W), or (views, 3, H, W).
        stamp: name -> what identifies the file's content (resolved path, size, mtime).
        cache_root: store/features.
        scratch: folder of this stage on the same file system; ranks write their shares here, and it is noted here which
            features the stage reads.
        description: image transform and tower output fields.
        views: where images are tiled, name -> how many tiles.
    """
    index = _rows(images, views)
    key = _key(tower, images, stamp, description)
    folder = cache_root / key
    if rank() == 0:  # before they are computed: from now on they are in use
        note_used(scratch, [key])
    if rank() == 0 and folder.exists() and (problems := integrity.check_folder(folder)):
        log.warning("feature cache %s is damaged and computed again: %s", folder, "; ".join(problems))
        shutil.rmtree(folder)
    barrier()
    computed = 0 if folder.exists() else _compute(tower, index, load, scratch / PART, folder)
    barrier()
    shape = (_num_views(index), tower.num_tokens, tower.hidden_size)
    dtype = next(tower.parameters()).dtype
    flat = torch.from_file(str(folder / FEATURES_FILE), shared=False, size=shape[0] * shape[1] * shape[2], dtype=dtype)
    return FeatureCache(flat.view(shape), index, computed)


def note_used(scratch: Path, keys: Sequence[str], file: str = FEATURES_USED_FILE) -> None:
    """Write into a stage's folder that it reads features (or what `file` lists) of these keys too."""
    path = scratch / file
    scratch.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_atomic(path, json.dumps(list(dict.fromkeys([*known, *keys]))))


def _rows(images: Sequence[str], views: Callable[[str], int] | None) -> dict[str, range]:
    """Where each image's views lie, in the order of `images`."""
    index, first = {}, 0
    for name in images:
        index[name] = range(first, first + (1 if views is None else views(name)))
        first = index[name].stop
    return index


def _num_views(index: dict[str, range]) -> int:
    return sum(len(rows) for rows in index.values())


def _compute(
    tower: HFVisionTower, index: dict[str, range], load: Callable[[str], Tensor], part: Path, folder: Path
) -> int:
    """Each rank encodes every world_size-th chunk straight into one shared file; rank 0 publishes it.

    Chunks that an earlier try has finished are taken over. A chunk is written while the tower has the next one.

    Returns:
        how many images no earlier try had finished.

    Raises:
        StoppedError: on every rank, when some rank was asked to stop.
        DiskError: there is no room for so many features.
    """
    parameter = next(tower.parameters())
    num_views, per_view = _num_views(index), tower.num_tokens * tower.hidden_size
    done = _Done(part, folder.name)
    if rank() == 0:
        done.begin(num_views * per_view * parameter.element_size())
    barrier()
    finished = done.read()
    shared = torch.from_file(str(part / FEATURES_FILE), shared=True, size=num_views * per_view, dtype=parameter.dtype)
    rows = shared.view(num_views, tower.num_tokens, tower.hidden_size)
    was_training = tower.training
    tower.eval()
    images = list(index)
    chunks = [images[first : first + CHUNK_IMAGES] for first in range(0, len(images), CHUNK_IMAGES)]
    here = [rows[index[chunk[0]].start : index[chunk[-1]].stop] for chunk in chunks]
    mine = range(rank(), len(chunks), world_size())
    todo = [number for number in mine if number not in finished or finished[number] != _checksum(here[number])]
    pixels, left = _loaded(load, [chunks[number] for number in todo]), set(todo)
    with Behind() as behind:
        for number in range(len(chunks)):
            if number % world_size() == 0 and any_rank([stop_requested()], parameter.device)[0]:
                at = f"stopped after the features of about {number * CHUNK_IMAGES:,} of {len(images):,} images"
                raise StoppedError(f"{at}; the same command continues from there")
            if number in left:
                behind.do(partial(_write, here[number], encode_views(tower, next(pixels)), done, number))
    tower.train(was_training)
    del rows, here, shared, behind
    barrier()
    if rank() == 0:
        done.forget()
        integrity.write_manifest(part, {"format": 1, "images": len(images)})
        integrity.mark_complete(part)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.rename(folder)
        except OSError:  # another run published the same features first: theirs are as good
            if integrity.check_folder(folder):
                raise
            shutil.rmtree(part)
    return sum(len(chunk) for number, chunk in enumerate(chunks) if number not in finished)


def _write(rows: Tensor, features: Tensor, done: _Done, number: int) -> None:
    rows.copy_(features)
    done.note(number, _checksum(rows))


class Behind:
    """Does one thing at a time in a thread, while whoever gives it something goes on: writing is not to hold up the tower."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._doing: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Begin with `work` once what was given before is done; its errors are raised here, and at the end of the block."""
        self._wait()
        self._doing = self._thread.submit(work)

    def _wait(self) -> None:
        if self._doing is not None:
            self._doing.result()


def _loaded(load: Callable[[str], Tensor], chunks: Sequence[list[str]]) -> Iterator[list[Tensor]]:
    """Yield the pixels of each chunk's images; several are decoded at once, the next chunk's while the tower has this one."""
    with ThreadPoolExecutor(max(1, usable_cores() // world_size())) as readers:
        try:
            waiting: deque[list[Future[Tensor]]] = deque()
            for chunk in chunks:
                waiting.append([readers.submit(load, name) for name in chunk])
                if len(waiting) > 1:
                    yield [image.result() for image in waiting.popleft()]
            while waiting:
                yield [image.result() for image in waiting.popleft()]
        finally:
            readers.shutdown(cancel_futures=True)


def encode_views(tower: HFVisionTower, pixels: list[Tensor]) -> Tensor:
    """(V, P, Dv) of all views of some images, or of all frames of clips, on the CPU."""
    views = torch.cat([one if one.dim() == 4 else one[None] for one in pixels])
    return torch.cat([encode_images(tower, some).cpu() for some in views.split(CHUNK_IMAGES)])


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(rows.view(torch.uint8).numpy().data)


class _Done:
    """Which chunks of a half-made feature file are finished: for each rank a list of (number, CRC-32) in the file's folder.

    A checksum tells what a power cut took back.

    Args:
        part: folder of the half-made file.
        key: of the features; what was begun for others is begun anew.
    """

    def __init__(self, part: Path, key: str) -> None:
        self.part = part
        self.key = key

    def begin(self, size: int) -> None:
        """Take over what an earlier try has left, or make a file of `size` bytes. Rank 0 only."""
        path = self.part / FEATURES_FILE
        if path.exists() and path.stat().st_size == size and list(self.part.glob(f"{self.key}-*")):
            return
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        reserve(path, size)

    def read(self) -> dict[int, int]:
        """Return chunk -> checksum of all ranks of the earlier try."""
        lines = [line.split() for path in self.part.glob(f"{self.key}-*") for line in path.read_text().splitlines()]
        return {int(words[0]): int(words[1]) for words in lines if len(words) == 3}  # a kill leaves half a line

    def note(self, number: int, checksum: int) -> None:
        """Say that a chunk is finished."""
        require_claim()
        with (self.part / f"{self.key}-{rank()}").open("a") as file:
            file.write(f"{number} {checksum} .\n")

    def forget(self) -> None:
        """Remove the lists once all is finished. Rank 0 only."""
        for path in self.part.glob(f"{self.key}-*"):
            path.unlink()


def _key(
    tower: HFVisionTower, images: Sequence[str], stamp: Callable[[str], object], description: dict[str, object]
) -> str:
    digest = tower_digest(tower, description)
    for name in images:
        digest.update(json.dumps([name, stamp(name)]).encode())
    return digest.hexdigest()[:32]


def tower_digest(tower: HFVisionTower, description: dict[str, object]) -> Any:
    """SHA-256, to be gone on with, of what decides what a tower makes of pixels: its weights, the preprocessing, the code."""
    code = {"version": FEATURES_VERSION, **{name: version(name) for name in COMPUTED_BY}}
    digest = hashlib.sha256(json.dumps({**description, "code": code}, sort_keys=True).encode())
    digest.update(str(next(tower.parameters()).dtype).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest
