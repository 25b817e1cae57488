"""Features of a frozen tower, computed once an image and memory-mapped from disk.

The cache changes no result: features are stored in the tower's own dtype and computed in fixed chunks, so every epoch, rank,
resume and run reads the same bytes. It lies under store/features/<key>, keyed by the tower's weights, the image transform and
the images themselves, and is shared by every run that trains on the same images with the same frozen tower.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinylmm import integrity
from tinylmm.models.vision import HFVisionTower, encode_images
from tinylmm.training.ranks import barrier, rank, world_size

log = logging.getLogger(__name__)

CHUNK_IMAGES = 64
FEATURES_FILE = "features.bin"
GIB = 1024**3


@dataclass(frozen=True)
class FeatureCache:
    """Features of N images.

    Attributes:
        features: (N, P, Dv), memory-mapped, read only.
        index: image path as written in the data -> row.
    """

    features: Tensor
    index: dict[str, int]

    def __call__(self, images: Sequence[str]) -> Tensor:
        """Return (len(images), P, Dv)."""
        return self.features[torch.tensor([self.index[image] for image in images])]


def estimate_gib(tower: HFVisionTower, num_images: int) -> float:
    """Size on disk of the features of `num_images` images, GiB."""
    bytes_each = next(tower.parameters()).element_size()
    return num_images * tower.num_tokens * tower.hidden_size * bytes_each / GIB


def open_features(
    tower: HFVisionTower,
    images: Sequence[str],
    load: Callable[[str], Tensor],
    stamp: Callable[[str], object],
    cache_root: Path,
    scratch: Path,
    description: dict[str, object],
) -> FeatureCache:
    """Return the features of `images`, computing them first where no valid cache is on disk. Every rank must call it.

    Args:
        tower: frozen, already on its device.
        images: distinct image names, in a fixed order.
        load: name -> normalised pixels (3, H, W).
        stamp: name -> what identifies the file's content (resolved path, size, mtime).
        cache_root: store/features.
        scratch: a folder of this stage on the same file system; ranks write their shares here.
        description: image transform and tower output fields.
    """
    key = _key(tower, images, stamp, description)
    folder = cache_root / key
    if rank() == 0 and folder.exists() and (problems := integrity.check_folder(folder)):
        log.warning("feature cache %s is damaged and computed again: %s", folder, "; ".join(problems))
        shutil.rmtree(folder)
    barrier()
    if not folder.exists():
        _compute(tower, images, load, scratch, folder)
    barrier()
    shape = (len(images), tower.num_tokens, tower.hidden_size)
    dtype = next(tower.parameters()).dtype
    flat = torch.from_file(str(folder / FEATURES_FILE), shared=False, size=shape[0] * shape[1] * shape[2], dtype=dtype)
    return FeatureCache(flat.view(shape), {name: row for row, name in enumerate(images)})


def _compute(
    tower: HFVisionTower, images: Sequence[str], load: Callable[[str], Tensor], scratch: Path, folder: Path
) -> None:
    """Each rank encodes every world_size-th chunk straight into one shared file; rank 0 publishes it."""
    part = scratch / "features.part"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    dtype = next(tower.parameters()).dtype
    per_image = tower.num_tokens * tower.hidden_size
    path = part / FEATURES_FILE
    if rank() == 0:
        with path.open("wb") as file:
            file.truncate(len(images) * per_image * torch.empty((), dtype=dtype).element_size())
    barrier()
    shared = torch.from_file(str(path), shared=True, size=len(images) * per_image, dtype=dtype)
    rows = shared.view(len(images), tower.num_tokens, tower.hidden_size)
    was_training = tower.training
    tower.eval()
    for number, first in enumerate(range(0, len(images), CHUNK_IMAGES)):
        if number % world_size() == rank():
            chunk = images[first : first + CHUNK_IMAGES]
            rows[first : first + len(chunk)] = encode_images(tower, torch.stack([load(name) for name in chunk])).cpu()
    tower.train(was_training)
    del rows, shared
    barrier()
    if rank() == 0:
        integrity.write_manifest(part, {"format": 1, "images": len(images)})
        integrity.mark_complete(part)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.rename(folder)
        except OSError:  # another run published the same features first: theirs are as good
            if integrity.check_folder(folder):
                raise
            shutil.rmtree(part)


def _key(
    tower: HFVisionTower, images: Sequence[str], stamp: Callable[[str], object], description: dict[str, object]
) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(str(next(tower.parameters()).dtype).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name in images:
        digest.update(json.dumps([name, stamp(name)]).encode())
    return digest.hexdigest()[:32]
