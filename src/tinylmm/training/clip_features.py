"""Features of the frames of clips that a frozen tower has seen: kept once a clip and choice of frames, for whoever asks again.

Each clip has a folder of its own beside the feature files of images, keyed by the tower's weights, the preprocessing, the
file and the numbers of its frames: stages, questions and runs that show a clip share it whatever else they show, and only
what is not there yet is decoded.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinylmm.config.cores import usable_cores
from tinylmm.errors import DataError, StoppedError
from tinylmm.models.vision import HFVisionTower
from tinylmm.stop import require_claim, stop_requested
from tinylmm.store import integrity
from tinylmm.store.disk import reserve
from tinylmm.training.features import FEATURES_FILE, PART, Behind, FeatureCache, encode_views, note_used, tower_digest
from tinylmm.training.ranks import any_rank, barrier, from_rank_zero, rank, world_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipFeatures:
    """Features of clips on disk, mapped when they are asked for.

    Attributes:
        folders: name -> folder of its features.
        frames: name -> how many frames it is shown with.
        shape: (P, Dv) of a frame.
        computed: how many were not there before.
    """

    folders: Mapping[str, Path]
    frames: Mapping[str, int]
    shape: tuple[int, int]
    dtype: torch.dtype
    computed: int

    def __contains__(self, name: str) -> bool:
        return name in self.folders

    def __len__(self) -> int:
        return len(self.folders)

    @property
    def disk_bytes(self) -> int:
        """Size of all clips' features."""
        tokens, width = self.shape
        return sum(self.frames[name] for name in self.folders) * tokens * width * self.dtype.itemsize

    def __call__(self, name: str) -> Tensor:
        """Return (T, P, Dv) of a clip."""
        tokens, width = self.shape
        count = self.frames[name]
        path = self.folders[name] / FEATURES_FILE
        flat = torch.from_file(str(path), shared=False, size=count * tokens * width, dtype=self.dtype)
        return flat.view(count, tokens, width)


@dataclass(frozen=True)
class MixedFeatures:
    """Features of images and clips; `images` is None where there are none."""

    images: FeatureCache | None
    clips: ClipFeatures

    def __len__(self) -> int:
        return len(self.clips) + (0 if self.images is None else len(self.images))

    @property
    def computed(self) -> int:
        """How many were not there before."""
        return self.clips.computed + (0 if self.images is None else self.images.computed)

    @property
    def disk_bytes(self) -> int:
        """Size of all features."""
        return self.clips.disk_bytes + (0 if self.images is None else self.images.disk_bytes)

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Return the views of images and the frames of clips one behind the other, (V, P, Dv)."""
        return torch.cat([self.clips(name) if name in self.clips else self._image(name) for name in names])

    def _image(self, name: str) -> Tensor:
        assert self.images is not None, "every image is in the cache"
        return self.images([name])


def open_clips(
    tower: HFVisionTower,
    clips: Mapping[str, int],
    load: Callable[[str], Tensor],
    stamp: Callable[[str], object],
    cache_root: Path,
    scratch: Path,
    description: dict[str, object],
    damaged: Callable[[str, DataError], None] | None = None,
) -> ClipFeatures:
    """Return the features of clips, computing those that are not on disk yet. Every rank must call it.

    Args:
        tower: frozen, already on its device.
        clips: name -> number of frames that are shown.
        load: name -> normalised pixels (T, 3, H, W).
        stamp: name -> what identifies the file's content and the frames that are shown.
        cache_root, scratch, description: as in `open_features`.
        damaged: told of each clip that cannot be decoded, which then has no features; it may raise the error.

    Raises:
        DataError: a clip cannot be decoded, and nobody is to be told.
        StoppedError: on every rank, when some rank was asked to stop; clips that are done stay.
        DiskError: there is no room for so many features.
    """
    begun = tower_digest(tower, description)
    folders: dict[str, Path] = {}
    for name in clips:
        digest = begun.copy()
        digest.update(json.dumps(["clip", stamp(name)]).encode())
        folders[name] = cache_root / digest.hexdigest()[:32]
    if rank() == 0:  # before they are computed: from now on they are in use
        note_used(scratch, [folder.name for folder in folders.values()])
    missing = from_rank_zero(_missing(folders) if rank() == 0 else None)
    _compute(tower, missing, folders, _read(load, damaged), scratch / PART)
    frames = sum(clips[name] for name in missing)
    log.info(
        "encoded %d clips (%d frames); of %d others the features were there",
        len(missing),
        frames,
        len(clips) - len(missing),
    )
    barrier()
    parameter = next(tower.parameters())
    shape = (tower.num_tokens, tower.hidden_size)
    there = {name: folder for name, folder in folders.items() if damaged is None or folder.exists()}
    return ClipFeatures(there, clips, shape, parameter.dtype, sum(name in there for name in missing))


def _read(
    load: Callable[[str], Tensor], damaged: Callable[[str, DataError], None] | None
) -> Callable[[str], Tensor | None]:
    """`load`, or None of a clip that cannot be decoded, where somebody is told."""
    if damaged is None:
        return load

    def read(name: str) -> Tensor | None:
        try:
            return load(name)
        except DataError as error:
            damaged(name, error)
            return None

    return read


def _missing(folders: Mapping[str, Path]) -> list[str]:
    """One name of each folder that is not there, or damaged and so removed."""
    found = {}
    for name, folder in folders.items():
        if folder.exists() and (problems := integrity.check_folder(folder)):
            log.warning("features of the clip %s are damaged and computed again: %s", name, "; ".join(problems))
            shutil.rmtree(folder)
        if not folder.exists():
            found[folder] = name
    return list(found.values())


def _compute(
    tower: HFVisionTower,
    missing: Sequence[str],
    folders: Mapping[str, Path],
    load: Callable[[str], Tensor | None],
    part: Path,
) -> None:
    """Each rank encodes every world_size-th clip, and publishes each while the tower has the next; of None nothing."""
    mine = missing[rank() :: world_size()]
    device = next(tower.parameters()).device
    was_training = tower.training
    tower.eval()
    pixels = _loaded(load, mine)
    with Behind() as behind:
        for first in range(0, len(missing), world_size()):
            if any_rank([stop_requested()], device)[0]:
                pixels.close()
                at = f"stopped after the features of {first:,} of {len(missing):,} clips"
                raise StoppedError(f"{at}; the same command continues from there")
            if first + rank() < len(missing):
                name, clip = missing[first + rank()], next(pixels)
                if clip is not None:
                    folder = folders[name]
                    behind.do(partial(_publish, encode_views(tower, [clip]), part / folder.name, folder))
    tower.train(was_training)


def _loaded(load: Callable[[str], Tensor | None], clips: Sequence[str]) -> Generator[Tensor | None, None, None]:
    """Yield the pixels of each clip, (T, 3, H, W), or None; as many are decoded ahead as there are cores for it."""
    workers = max(1, usable_cores() // world_size())
    with ThreadPoolExecutor(workers) as readers:
        try:
            waiting: deque[Future[Tensor | None]] = deque()
            for name in clips:
                waiting.append(readers.submit(load, name))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)


def _publish(features: Tensor, part: Path, folder: Path) -> None:
    """Write (T, P, Dv) beside, then move it to where it is looked for."""
    require_claim()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    content = features.contiguous()
    reserve(part / FEATURES_FILE, content.numel() * content.element_size())
    shared = torch.from_file(str(part / FEATURES_FILE), shared=True, size=content.numel(), dtype=content.dtype)
    shared.copy_(content.flatten())
    del shared
    integrity.write_manifest(part, {"format": 1, "frames": len(content)})
    integrity.mark_complete(part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.rename(folder)
    except OSError:  # another run published the same features first: theirs are as good
        if integrity.check_folder(folder):
            raise
        shutil.rmtree(part)
