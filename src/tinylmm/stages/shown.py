"""What an evaluation shows a model: images, and frames of videos, each decoded and encoded once for all its questions.

What cannot be read stops the evaluation, or, where that is allowed (`eval.NAME.on_bad=skip`), is noted: black pixels stand for
it, so that all else goes on as it would, and whoever asks throws the answers about it away (`fault_of`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tinylmm.config.description import ModelDescription
from tinylmm.config.video import Baseline, SamplingSpec
from tinylmm.constants import Extent
from tinylmm.data.frame_folders import folder_clip, folder_frames
from tinylmm.data.frame_sampling import Clip, baseline_indices, frame_indices
from tinylmm.data.transform import ImageTransform
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

FAULTS_SHOWN = 20
_ANY_SIZE = (32, 32)
"""Of the black image that stands for one whose size is not known."""
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
        faults: key -> what is wrong with it, of images and videos that could not be read so far.

    Raises:
        DataError: more images and videos cannot be read than the evaluation allows; the message names them.
        StoppedError: a stop was asked for.
    """

    def __init__(
        self,
        job: StageJob[EvalStage],
        loaded: LoadedModel,
        refs: Mapping[str, ImageRef],
        sampling: SamplingSpec | None,
    ) -> None:
        self.refs, self._job, self._sampling = refs, job, sampling
        self.transform = ImageTransform.of(loaded.description.image)
        self.faults: dict[str, str] = {}
        self._clips: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        self.extents: dict[str, Extent] = {key: self._extent(key, loaded.model.tiled) for key in refs}
        self._refuse_more_than_allowed()
        self.stored = None
        self.computed = 0
        tower, launch, counts = loaded.model.vision_tower, job.settings.launch, self._counts
        if counts and launch.cache_features and estimate_gib(tower, sum(counts.values())) <= launch.cache_features_gib:
            described = loaded.description.as_json()
            description = {"image": described["image"], "tower": described["vision_tower"]}
            where = (StoreLayout(job.store).features, job.folder, description)
            self.stored = open_clips(tower, counts, self._read, self._stamp, *where, damaged=self._note)
            self.computed = self.stored.computed

    def pixels(self, key: str) -> Tensor:
        """(3, H, W) of an image, (T, 3, H, W) of its tiles or of a video's frames; black where it cannot be read.

        Raises:
            DataError: it cannot be read, and no more such are allowed.
        """
        try:
            if key not in self.faults:
                return self._read(key)
        except DataError as error:
            self._note(key, error)
        width, height, *frames = self.extents[key]
        black = Image.new("RGB", (width, height) if width and height else _ANY_SIZE)
        if frames:
            return torch.stack([self.transform.one_view(black)] * frames[0])
        return self.transform(black)

    def times(self, item: Item, keys: Mapping[str, str]) -> list[float]:
        """Seconds at which the frames of an item's videos are shown, ascending; none of a video that cannot be read."""
        found: list[float] = []
        for ref in item.images:
            key = keys[ref.key]
            if ref.video and key not in self.faults:
                found += self._clip(key, ref)[1]
        return sorted(found)

    @property
    def readers(self) -> int:
        """Threads that may read at once: several where all are images in files of their own, or whose bytes are at hand."""
        alone = any(ref.video or (ref.row is not None and ref.data is None) for ref in self.refs.values())
        return 1 if alone else min(READERS, os.cpu_count() or 1)

    @property
    def _counts(self) -> dict[str, int]:
        return {key: len(frames) for key, (frames, _) in self._clips.items()}

    def _extent(self, key: str, tiled: bool) -> Extent:
        ref = self.refs[key]
        try:
            if ref.video:
                return (0, 0, len(self._clip(key, ref)[0]))
            return open_image_ref(ref).size if tiled else (0, 0)
        except DataError as error:
            self.faults[key] = str(error)
            return (0, 0, 1) if ref.video else _ANY_SIZE if tiled else (0, 0)

    def _clip(self, key: str, ref: ImageRef) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Numbers of the frames that are shown, and when in the video each is."""
        if key not in self._clips:
            spec = self._job.spec
            sampling = spec.sampling or ref.sampling or self._sampling
            assert sampling is not None, "sampling_of has found one"
            self._clips[key] = _frames_of(ref, sampling, spec.frames)
        return self._clips[key]

    def _read(self, key: str) -> Tensor:
        ref = self.refs[key]
        if ref.video and ref.fps is not None:
            images = folder_frames(ref.path, self._clips[key][0])
            return torch.stack([self.transform.one_view(image) for image in images])
        if ref.video:
            return torch.stack(see_frames(ref.path, self._clips[key][0], self.transform.one_view))
        return self.transform(open_image_ref(ref))

    def _note(self, key: str, error: DataError) -> None:
        self.faults[key] = str(error)
        self._refuse_more_than_allowed()

    def _refuse_more_than_allowed(self) -> None:
        refuse_faults(self._job, self.faults)

    def _stamp(self, key: str) -> list[object]:
        path = self.refs[key].path.resolve()
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns, list(self._clips[key][0])]


def fault_of(item: Item, keys: Mapping[str, str], faults: Mapping[str, str]) -> str | None:
    """What is wrong with an item's images, where one could not be read; `faults` are by key."""
    return next((faults[keys[ref.key]] for ref in item.images if keys[ref.key] in faults), None)


def refuse_faults(job: StageJob[EvalStage], faults: Mapping[str, str]) -> None:
    """Stop where more images and videos cannot be read than are allowed.

    Args:
        faults: key -> what is wrong.

    Raises:
        DataError: names them, up to FAULTS_SHOWN, and says how to go on without.
    """
    (location,) = job.locations
    if len(faults) <= location.source.allowed:
        return
    key = f"eval.{job.name.partition('@')[0]}"
    shown = [f"  {fault}" for fault in list(faults.values())[:FAULTS_SHOWN]]
    shown += [f"  ... and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    raise DataError(
        "\n".join(
            [
                f"{job.name}: {len(faults)} images or videos cannot be read, {location.source.allowed} allowed "
                f"(on_bad={location.source.on_bad})",
                *shown,
                f"Put them right, or set {key}.on_bad=skip and {key}.max_bad={len(faults)} or more: questions about them are "
                "then counted, and scored as questions without an answer.",
            ]
        )
    )


def _frames_of(
    ref: ImageRef, sampling: SamplingSpec, baseline: Baseline | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    clip = _clip(ref)
    chosen = frame_indices(sampling, clip, ref.part)
    frames = chosen if baseline is None else baseline_indices(baseline, chosen, clip, ref.part)
    return tuple(frames), tuple((number - clip.first) / clip.fps for number in frames)


def _clip(ref: ImageRef) -> Clip:
    if not ref.path.is_file() and (ref.fps is None or not ref.path.is_dir()):
        raise DataError(f"video {ref.path} does not exist. Put the benchmark's videos there.")
    return read_video(ref.path).clip if ref.fps is None else folder_clip(ref.path, ref.fps)
