"""The images and videos of a training: opened inside their folders, counted in tokens, or read as a frozen tower's features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tinylmm.data.clip_list import read_clips
from tinylmm.data.collate import Collator, ImageTokens
from tinylmm.data.image_folders import ImageFolder, ImageFolders
from tinylmm.data.transform import ImageTransform
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.planning.specs import TrainStage
from tinylmm.stages.images import EMBEDDED_FOLDER
from tinylmm.stages.job import StageJob
from tinylmm.store.layout import StoreLayout
from tinylmm.training.clip_features import MixedFeatures, open_clips
from tinylmm.training.features import FeatureCache, estimate_gib, open_features

log = logging.getLogger(__name__)

Features = FeatureCache | MixedFeatures
"""Names -> features of their views one behind the other, (V, P, Dv)."""


def outputs_of(job: StageJob[TrainStage], role: Literal["prepared", "images"]) -> list[Path]:
    """Outputs of the stages that prepared the training's sources, or checked their images; a mixture's in its order."""
    if role in job.parents:
        return [job.parents[role]]
    return [job.parents[f"{role}.{number}"] for number in range(len(job.spec.mixture or ()))]


class SeenImages:
    """Opens a stage's images and videos, inside its image folders only.

    Attributes:
        bytes_of: name -> what `decode` gives, from wherever it is kept (`stages/kept.py`).
    """

    def __init__(self, folders: ImageFolders, loaded: LoadedModel) -> None:
        self.folders = folders
        self.transform = ImageTransform.of(loaded.description.image)
        self.bytes_of: Callable[[str], np.ndarray] = self.decode
        self._sizes: dict[str, tuple[int, int]] = {}
        self._model = model = loaded.model
        differ = model.tiled or self.folders.have_clips
        self.tokens: ImageTokens = self._tokens if differ else model.image_tokens

    @classmethod
    def of(cls, job: StageJob[TrainStage], loaded: LoadedModel) -> SeenImages:
        """Those of a stage, as a model sees them."""
        folders = []
        for location, checked in zip(job.locations, outputs_of(job, "images"), strict=True):
            source = location.source
            paths, upright = job.root_of(location) / source.images, source.orientation == "apply"
            embedded = checked / EMBEDDED_FOLDER
            folders.append(ImageFolder(paths, embedded, source.follow_links, upright, read_clips(checked)))
        return cls(ImageFolders(folders), loaded)

    @property
    def frames_if_any(self) -> Callable[[str], int] | None:
        """`frames`, or None where the sources have no videos."""
        return self.frames if self.folders.have_clips else None

    def pixels(self, name: str) -> Tensor:
        """(3, H, W) of one image, (T, 3, H, W) of a clip's frames, or of an image's tiles."""
        return self.transform.normalise(self.bytes_of(name))

    def decode(self, name: str, data: bytes | None = None) -> np.ndarray:
        """Bytes of `pixels` before they are normalised, uint8 of the same shape; of `data` where an image's file is read."""
        if self.frames(name):
            return np.stack(self.folders.see_clip(name, self.transform.whole))
        return self.transform.views(self.folders.open(name, data))

    def narrow_pixels(self, name: str) -> Tensor:
        """`pixels` in bf16."""
        return self.pixels(name).to(torch.bfloat16)

    def frames(self, name: str) -> int:
        """How many frames a clip is shown with; 0 for an image."""
        return len(self.folders.frames(name))

    def views(self, name: str) -> int:
        """How often the tower looks: once at each frame, tile or image."""
        if frames := self.frames(name):
            return frames
        tiling = self.transform.tiling
        return 1 if tiling is None else tiling.num_tiles(*self.size(name))

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of one image in pixels; (0, 0) of a video, whose frames are never tiled."""
        if self.frames(name):
            return 0, 0
        if name not in self._sizes:
            self._sizes[name] = self.folders.size(name)
        return self._sizes[name]

    def stamp(self, name: str) -> list[Any]:
        """What tells this image from any other: resolved path, size, modification time, and whether it is turned.

        Of a video, which frames of it are shown.
        """
        path = self.folders.find(name)
        status = path.stat()
        found = [str(path), status.st_size, status.st_mtime_ns]
        if frames := self.folders.frames(name):
            return [*found, list(frames)]
        return [*found, "upright"] if self.folders.upright(name) else found

    def _tokens(self, name: str) -> int:
        if frames := self.frames(name):
            return self._model.tokens_of_clip(frames)
        return self._model.tokens_of(*self.size(name)) if self._model.tiled else self._model.image_tokens


class WithFeatures:
    """A collator whose images come out as cached tower features."""

    def __init__(self, collator: Collator, cache: Features) -> None:
        self.collator = collator
        self.cache = cache

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(samples)
        batch.pop("pixel_values", None)
        names = batch.pop("image_paths")
        batch["image_features"] = self.cache(names) if names else None
        return batch


def open_cache(
    job: StageJob[TrainStage], loaded: LoadedModel, names: Sequence[str], seen: SeenImages
) -> Features | None:
    """Return the frozen tower's features of all images and videos, computed first where they are not kept yet.

    None where the tower is trained, or the launch wants none, or not so many.
    """
    launch, tower = job.settings.launch, loaded.model.vision_tower
    if not launch.cache_features or not names or any(p.requires_grad for p in tower.parameters()):
        return None
    differ = seen.transform.tiling is not None or seen.folders.have_clips
    size = estimate_gib(tower, sum(map(seen.views, names)) if differ else len(names))
    if size > launch.cache_features_gib:
        log.info(
            "tower features of %d images would take %.1f GiB, more than launch.cache_features_gib: computed at every step",
            len(names),
            size,
        )
        return None
    described = loaded.description.as_json()
    description = {"image": described["image"], "tower": described["vision_tower"]}
    where = (StoreLayout(job.store).features, job.folder, description)
    clips = {name: frames for name in names if (frames := seen.frames(name))}
    images = [name for name in names if name not in clips]
    views = seen.views if seen.transform.tiling is not None else None
    found = open_features(tower, images, seen.pixels, seen.stamp, *where, views) if images else None
    if not clips:
        return found
    return MixedFeatures(found, open_clips(tower, clips, seen.pixels, seen.stamp, *where))
