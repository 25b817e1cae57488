"""What an evaluation shows a model: images, and frames of videos, each decoded and encoded once for all its questions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tinylmm.config.description import ModelDescription
from tinylmm.config.video import Baseline, SamplingSpec
from tinylmm.constants import Extent
from tinylmm.data.frame_folders import folder_clip, folder_frames
from tinylmm.data.frame_sampling import Clip, baseline_indices, frame_indices
from tinylmm.data.images import ImageTransform
from tinylmm.data.video import read_video, see_frames
from tinylmm.errors import DataError, UserError
from tinylmm.evaluation.benchmarks.records import ImageRef, Item
from tinylmm.evaluation.images import open_image_ref
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.planning.specs import AskedStage, EvalStage
from tinylmm.stages.job import StageJob
from tinylmm.store.layout import MODEL_FOLDER, StoreLayout
from tinylmm.training.clip_features import open_clips
from tinylmm.training.features import estimate_gib

READERS = 4
"""Most threads that read images of a benchmark: a core decodes and resizes about 95 photos of 640 x 480 a second."""


def model_folder(job: StageJob[AskedStage]) -> Path:
    """Where the model that is asked lies."""
    made_here = job.parents.get("model")
    return Path(job.settings.folders["model"]) if made_here is None else made_here / MODEL_FOLDER


def sampling_of(job: StageJob[EvalStage], items: Sequence[Item]) -> SamplingSpec | None:
    """The frames of videos that are shown; None where there is no video.

    As asked for, else as the benchmark's protocol says (each question its own), else as the model was trained.

    Raises:
        UserError: there are videos, and nothing says it.
    """
    videos = [ref for item in items for ref in item.images if ref.video]
    if not videos:
        return None
    by_protocol = next((ref.sampling for ref in videos if ref.sampling is not None), None)
    found = job.spec.sampling or by_protocol or ModelDescription.of_folder(model_folder(job)).sampling
    if found is None:
        raise UserError(
            f"{job.name}: its questions are about videos, and the model was trained on none, so nothing says which frames to "
            f"show. Set eval.{job.name.partition('@')[0]}.sampling={{uniform: 16}}, or another."
        )
    return found


class Shown:
    """Images and videos by key.

    Every rank must make one. Where the launch keeps features, those of videos are computed here, or found in the store.

    Attributes:
        extents: key -> width and height, where the model wants to know, and frames of a video.
        stored: features of videos, where they are kept.
        computed: videos whose features were not in the store.

    Raises:
        DataError: a video cannot be read.
        StoppedError: a stop was asked for.
    """

    def __init__(
        self,
        job: StageJob[EvalStage],
        loaded: LoadedModel,
        refs: Mapping[str, ImageRef],
        sampling: SamplingSpec | None,
    ) -> None:
        self.refs = refs
        self.transform = ImageTransform.of(loaded.description.image)
        videos = {key: ref for key, ref in refs.items() if ref.video}
        asked, baseline = job.spec.sampling, job.spec.frames
        self._frames = {
            key: _frames_of(ref, asked or ref.sampling or sampling, baseline) for key, ref in videos.items()
        }
        tiled = loaded.model.tiled
        self.extents: dict[str, Extent] = {
            key: (0, 0, len(self._frames[key]))
            if key in self._frames
            else open_image_ref(ref).size
            if tiled
            else (0, 0)
            for key, ref in refs.items()
        }
        self.stored = None
        self.computed = 0
        tower, launch, counts = loaded.model.vision_tower, job.settings.launch, self._counts
        if counts and launch.cache_features and estimate_gib(tower, sum(counts.values())) <= launch.cache_features_gib:
            described = loaded.description.as_json()
            description = {"image": described["image"], "tower": described["vision_tower"]}
            where = (StoreLayout(job.store).features, job.folder, description)
            self.stored = open_clips(tower, counts, self.pixels, self._stamp, *where)
            self.computed = self.stored.computed

    @property
    def readers(self) -> int:
        """Threads that may read at once: several where all are images in files of their own, or whose bytes are at hand."""
        alone = any(ref.video or (ref.row is not None and ref.data is None) for ref in self.refs.values())
        return 1 if alone else min(READERS, os.cpu_count() or 1)

    @property
    def _counts(self) -> dict[str, int]:
        return {key: len(frames) for key, frames in self._frames.items()}

    def pixels(self, key: str) -> Tensor:
        """(3, H, W) of an image, (T, 3, H, W) of its tiles or of a video's frames."""
        ref = self.refs[key]
        if ref.video and ref.fps is not None:
            return torch.stack([self.transform.one_view(image) for image in folder_frames(ref.path, self._frames[key])])
        if ref.video:
            return torch.stack(see_frames(ref.path, self._frames[key], self.transform.one_view))
        return self.transform(open_image_ref(ref))

    def _stamp(self, key: str) -> list[object]:
        path = self.refs[key].path.resolve()
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns, list(self._frames[key])]


def _frames_of(ref: ImageRef, sampling: SamplingSpec | None, baseline: Baseline | None) -> tuple[int, ...]:
    assert sampling is not None, "sampling_of has found one"
    clip = _clip(ref)
    chosen = frame_indices(sampling, clip, ref.part)
    return tuple(chosen if baseline is None else baseline_indices(baseline, chosen, clip, ref.part))


def _clip(ref: ImageRef) -> Clip:
    if not ref.path.is_file() and (ref.fps is None or not ref.path.is_dir()):
        raise DataError(f"video {ref.path} does not exist. Put the benchmark's videos there.")
    return read_video(ref.path).clip if ref.fps is None else folder_clip(ref.path, ref.fps)
