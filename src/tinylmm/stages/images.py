"""The `images` stage: every image that a source names is decoded once, whatever tokenizers and templates read the source later.

Of a video the frames that the run shows are, and noted: which they are is known from then on without opening it, whatever
other annotation files name it.

Images that records carry in themselves (parquet cells, data URLs) become files here, each content once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tinylmm.config.video import SamplingSpec
from tinylmm.data.clip_list import write_clips
from tinylmm.data.image_names import VIDEO, embedded_path, is_embedded, video_path
from tinylmm.data.images import check_image, relative_name, safe_path
from tinylmm.data.records import Place
from tinylmm.data.sample import Sample, parse_record
from tinylmm.data.video import choose_frames, find_video
from tinylmm.errors import DataError
from tinylmm.planning.cache import Cache
from tinylmm.planning.specs import ImagesStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.pool import in_order
from tinylmm.stages.sources import Progress, Source, processes
from tinylmm.stop import require_claim
from tinylmm.store.layout import StoreLayout
from tinylmm.store.rows import frame, read_rows

log = logging.getLogger(__name__)

DOING = "checking images"
AT_ONCE = 32
"""Images that a process takes at a time."""
SERIAL_BELOW = 500
"""So few images are checked sooner in this process than in others that must start first."""
EMBEDDED_FOLDER = "embedded"
"""Below the stage's output: images that records carried, each content once (`data/image_names.py`)."""
FAULTS_FILE = "faults.jsonl"
"""In the stage's output: {"image", "fault"} of each image that cannot be used."""
CHECKED_FILE = "checked.jsonl"
"""In the scratch folder: what was found in each batch so far, in their order."""


def run(job: StageJob[ImagesStage]) -> dict[str, Any]:
    """Write `output/faults.jsonl`, `output/clips.jsonl` and `output/embedded`; return counts for the manifest.

    A faulty image is no error here: which records that concerns, and whether the run goes on without them, is for
    `prepare`. Batches that an earlier try has finished are not checked again.

    Raises:
        DataError: the annotation file cannot be read.
        StoppedError: a stop was asked for.
    """
    source, place = Source.of(job), Place()
    known = StoreLayout(job.store).fingerprints
    check = ImageCheck(source.images, source.follow_links, job.output / EMBEDDED_FOLDER, job.spec.sampling, known)
    progress = Progress(job, "images", DOING, place, source.limit)
    names = _new_names(_samples(source, place, progress, videos=job.spec.sampling is not None), check)
    scratch = job.folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    count = decoded = 0
    faults: dict[str, str] = {}
    clips: dict[str, list[int]] = {}
    for found in _checked(names, check, scratch / CHECKED_FILE, processes(job)):
        count += found.size
        decoded += found.decoded
        faults |= found.faults
        clips |= found.clips
        progress(found.size)
    for name in filter(is_embedded, faults):
        embedded_path(check.embedded, name).unlink(missing_ok=True)
    lines = [json.dumps({"image": name, "fault": fault}) + "\n" for name, fault in sorted(faults.items())]
    (job.output / FAULTS_FILE).write_text("".join(lines), encoding="utf-8")
    log.info("checked %d images; %d cannot be used", count, len(faults))
    summary = {"images": count - len(faults) - len(clips), "faulty": len(faults)}
    if job.spec.sampling is None:
        return summary
    write_clips(job.output, clips)
    log.info("decoded %d of %d videos; the others were checked before", decoded, len(clips))
    return summary | {"videos": len(clips), "videos_decoded": decoded}


def read_faults(output: Path) -> dict[str, str]:
    """What is wrong with images, by name, as `run` left it in its output folder."""
    lines = (output / FAULTS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return {row["image"]: row["fault"] for row in map(json.loads, lines)}


@dataclass
class Checked:
    """What was found of some images.

    Attributes:
        size: how many there are.
        faults: what is wrong with those that cannot be used.
        clips: frames of the videos among them that are shown.
        decoded: how many of these videos no earlier stage had found to be whole.
    """

    size: int
    faults: dict[str, str]
    clips: dict[str, list[int]] = field(default_factory=dict)
    decoded: int = 0


@dataclass(frozen=True)
class ImageCheck:
    """Looks at images and videos; travels to other processes.

    Attributes:
        images: the source's image folder.
        follow_links: links may lead out of it.
        embedded: where images lie that records carried.
        sampling: of videos; records with videos are not asked about without it.
        known: where it is kept which videos are whole: other annotation files often name the same ones.
    """

    images: Path
    follow_links: bool
    embedded: Path
    sampling: SamplingSpec | None = None
    known: Path | None = None

    def __call__(self, names: list[str]) -> Checked:
        """Look at some."""
        found = Checked(len(names), {})
        for name in names:
            try:
                if (video := video_path(name)) is not None:
                    found.clips[name], decoded = self._frames(video)
                    found.decoded += decoded
                elif (fault := self._fault(name)) is not None:
                    found.faults[name] = fault
            except DataError as error:
                found.faults[name] = str(error)
        return found

    def _frames(self, video: str) -> tuple[list[int], bool]:
        """Frames of a video that are shown, and whether they had to be decoded."""
        assert self.sampling is not None, "records with videos are refused without a sampling"
        assert self.known is not None, "the stage names a folder"
        path = find_video(self.images, video, self.follow_links)
        status = path.stat()
        where = {"clip": str(path.absolute()), "sampling": self.sampling.given()}
        cache = Cache(self.known, where, {"stat": [status.st_size, status.st_mtime_ns]})
        if (earlier := cache.read()) is not None:
            return earlier.value["frames"], False
        frames = choose_frames(path, self.sampling)
        cache.write({"frames": frames})
        return frames, True

    def keep(self, name: str, data: bytes) -> None:
        """Write an image that a record carried to its file."""
        path = embedded_path(self.embedded, name)
        if not path.exists() or path.read_bytes() != data:  # a kill or a power cut leaves half a file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _fault(self, name: str) -> str | None:
        path = embedded_path(self.embedded, name) if is_embedded(name) else None
        try:
            check_image(safe_path(self.images, name, self.follow_links) if path is None else path)
        except DataError as error:
            if path is None:
                return str(error)
            return f"the embedded image {name[:20]}: {str(error).removeprefix(f'{path}: ')}"
        return None


def names_of(sample: Sample, images: Path) -> tuple[str, ...]:
    """A sample's images as they are prepared: an absolute path inside the image folder is named from there.

    The folder may lie elsewhere when it is trained on.
    """

    def below(name: str) -> str:
        if (video := video_path(name)) is not None:
            return VIDEO + below(video)
        return relative_name(images, name) if name.startswith("/") else name

    return tuple(map(below, sample.images))


def _samples(source: Source, place: Place, progress: Progress, videos: bool) -> Iterator[Sample]:
    for index, record in enumerate(progress.read(source.records(place))):
        sample = parse_record(index, record, source.format, videos)
        if isinstance(sample, Sample):
            yield sample


def _new_names(samples: Iterable[Sample], check: ImageCheck) -> Iterator[str]:
    """Names of images, each once, in the order of the file; embedded ones lie in their files by then."""
    seen = SeenNames()
    for sample in samples:
        for name in names_of(sample, check.images):
            if seen.is_new(name):
                if name in sample.embedded:
                    check.keep(name, sample.embedded[name])
                yield name


class SeenNames:
    """Tells which names are new, in 8 bytes a name: a set of a million names takes a hundred megabytes, of their hashes 50.

    Hashes of 64 bits: of ten million names, two that are taken for one are a matter of 1 in 400,000.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []
        self._fresh: set[int] = set()

    def is_new(self, name: str) -> bool:
        """Whether the name comes for the first time."""
        key = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if key in self._fresh or any(_holds(keys, key) for keys in self._sorted):
            return False
        self._fresh.add(key)
        if len(self._fresh) >= 1 << 16:
            self._settle()
        return True

    def _settle(self) -> None:
        """Fresh keys become a sorted run; runs of a size are joined, so that there are few."""
        run = np.sort(np.fromiter(self._fresh, np.uint64, len(self._fresh)))
        self._fresh = set()
        while self._sorted and len(self._sorted[-1]) <= len(run):
            run = np.sort(np.concatenate([self._sorted.pop(), run]))
        self._sorted.append(run)


def _holds(keys: np.ndarray, key: int) -> bool:
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


def _checked(names: Iterator[str], check: ImageCheck, kept: Path, workers: int) -> Iterator[Checked]:
    """Yield what was found of each batch, in order; those that `kept` has from an earlier try first."""
    earlier = list(_earlier(kept))
    for row in earlier:
        yield Checked(len(list(islice(names, AT_ONCE))), row["faults"], row.get("clips", {}), row.get("decoded", 0))
    first = list(islice(names, SERIAL_BELOW))
    batches = _batches(chain(first, names))
    several = workers if len(first) == SERIAL_BELOW else 1
    with kept.open("ab", buffering=0) as file:
        for number, found in enumerate(in_order(check, batches, several, DOING), len(earlier)):
            require_claim()
            clips = {"clips": found.clips, "decoded": found.decoded} if found.clips else {}
            file.write(frame({"batch": number, "faults": found.faults, **clips}))
            yield found


def _earlier(kept: Path) -> Iterator[dict[str, Any]]:
    """Rows of the batches that are finished, up to the first damaged row; what stands behind is cut off."""
    rows = list(read_rows(kept)) if kept.exists() else []
    good: list[dict[str, Any]] = []
    for number, (_, row) in enumerate(rows):
        if row is None or row.get("batch") != number:
            break
        good.append(row)
    kept.write_bytes(b"".join(map(frame, good)))
    yield from good


def _batches(names: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(names, AT_ONCE)):
        yield batch
