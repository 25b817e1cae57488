"""A look at a whole source before anything is trained on it: counts, lengths, images, faults, repetitions.

Nothing is stopped by a bad record here: every one is listed. What is repeated is listed too, but is no fault.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tinylmm.config.cores import usable_cores
from tinylmm.config.video import SamplingSpec
from tinylmm.constants import IGNORE_INDEX
from tinylmm.data.frame_sampling import frame_indices
from tinylmm.data.image_names import is_embedded, video_path
from tinylmm.data.images import check_image, image_header, safe_path
from tinylmm.data.sample import BadRecord, Sample, read_samples
from tinylmm.data.segments import Rendered
from tinylmm.data.slots import learned_within, positions_of
from tinylmm.data.video import check_video, find_video, read_video
from tinylmm.errors import DataError

CHUNK = 512
"""Records whose images are looked at together."""
MAX_THREADS = 8

Renderer = Callable[[Sample], Rendered]
TokensBySize = Callable[[int, int, int], int]
"""Width and height of an image in pixels, and frames of a video, 0 for an image -> the tokens that a model makes of it."""


@dataclass(frozen=True)
class SourceFiles:
    """Where a source lies and what its records look like."""

    name: str
    annotations: Path
    images: Path
    layout: str
    limit: int | None
    follow_links: bool = False
    upright: bool = False
    """Images are turned as their camera says."""
    sampling: SamplingSpec | None = None
    """Which frames of videos are shown."""


@dataclass(frozen=True)
class _ImageFacts:
    """What is known of one image or video.

    Attributes:
        seconds: of a video, its length; frames: how many of it are shown.
        content: SHA-256 of its bytes, where they were read.
        turned: its camera says that it is to be shown turned or mirrored.
    """

    size: tuple[int, int] | None = None
    format: str = ""
    content: str | None = None
    fault: str | None = None
    turned: bool = False
    seconds: float | None = None
    frames: int = 0


@dataclass
class SourceCheck:
    """What was found in one source.

    Attributes:
        problem: why the file could not be read to its end, or None.
        records: in the file (up to the source's limit); samples: those without fault.
        faults: every record with a fault, in file order.
        turns, images: how many samples have so many turns, so many images.
        words: words of each sample, system message and answers included.
        tokens: tokens of each sample, images counted in, if a tokenizer was at hand; supervised: those trained on, in all.
        images_counted: whether it is known what an image takes; else each is one token.
        sizes, formats: of the distinct images, (width, height) in pixels; turned: those whose camera says to turn them.
        seconds: lengths of the distinct videos; with_videos: samples that have one.
        greeted: samples whose first answer is left out, as no question is before it.
        too_long: samples of which the stage's `max_length` leaves no token to learn; unless `images_counted`, there may be
            more. max_length, max_dropped: the stage's; None and all of them where tokens are not counted.
        same_conversations: (index, id) of samples that are equal in every word and image; groups of two and more.
        same_images: names of images with the same bytes; same_ids: ids that several records have, with their number.
    """

    files: SourceFiles
    problem: str | None = None
    records: int = 0
    samples: int = 0
    with_system: int = 0
    faults: list[BadRecord] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    images_counted: bool = False
    supervised: int = 0
    too_long: int = 0
    max_length: int | None = None
    max_dropped: float = 1.0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    seconds: list[float] = field(default_factory=list)
    with_videos: int = 0
    greeted: int = 0
    same_conversations: list[list[tuple[int, str]]] = field(default_factory=list)
    same_images: list[list[str]] = field(default_factory=list)
    same_ids: list[tuple[str, int]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every record can be trained on."""
        fits = self.too_long <= self.max_dropped * self.samples
        unsaid = self.with_videos > 0 and self.files.sampling is None
        return self.problem is None and not self.faults and self.samples > 0 and fits and not unsaid


def check_source(
    files: SourceFiles,
    render: Renderer | None = None,
    quick: bool = False,
    progress: Callable[[int], None] | None = None,
    max_length: int | None = None,
    max_dropped: float = 1.0,
    image_tokens: TokensBySize | None = None,
) -> SourceCheck:
    """Read a source from its first record to its last.

    Args:
        render: gives a sample's tokens, to count them.
        quick: look at the headers of images and videos only; broken ones and equal ones are then not found.
        progress: called with the number of records read so far.
        max_length, max_dropped: of the stage that trains on the source; samples that are too long are counted with `render`.
        image_tokens: width and height of an image, and frames of a video -> the tokens that the stage's model makes of it; by
            default one.
    """
    check = SourceCheck(files, max_length=max_length, max_dropped=max_dropped, images_counted=image_tokens is not None)
    state = _State()
    threads = ThreadPoolExecutor(min(MAX_THREADS, usable_cores()))
    try:
        records = enumerate(islice(read_samples(files.annotations, files.layout, videos=True), files.limit))
        while chunk := list(islice(records, CHUNK)):
            _look_at_images(chunk, check, state, threads, quick)
            for index, record in chunk:
                _take(index, record, check, state, render, image_tokens)
            if progress is not None:
                progress(check.records)
    except DataError as error:
        check.problem = str(error)
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C waits for the images being opened, not for those in line
    if check.problem is None and not check.samples:
        check.problem = f"{files.annotations}: no usable record among {check.records}"
    check.faults.sort(key=lambda bad: bad.index)
    check.same_conversations = [group for group in state.conversations.values() if len(group) > 1]
    check.same_images = [sorted(names) for names in state.contents.values() if len(names) > 1]
    check.same_ids = [(name, count) for name, count in state.ids.items() if count > 1]
    return check


@dataclass
class _State:
    """What must be remembered to find repetitions."""

    ids: Counter[str] = field(default_factory=Counter)
    seen: dict[str, _ImageFacts] = field(default_factory=dict)
    conversations: dict[bytes, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def _look_at_images(
    chunk: Sequence[tuple[int, Sample | BadRecord]],
    check: SourceCheck,
    state: _State,
    threads: ThreadPoolExecutor,
    quick: bool,
) -> None:
    new: dict[str, Mapping[str, bytes]] = {}
    for _, record in chunk:
        if isinstance(record, Sample):
            new |= {name: record.embedded for name in record.images if name not in state.seen}
    facts = threads.map(lambda name: _facts(name, check.files, new[name].get(name), quick), new)
    for name, found in zip(new, facts, strict=True):
        state.seen[name] = found
        if found.seconds is not None:
            check.seconds.append(found.seconds)
        elif found.size is not None:
            check.sizes[found.size] += 1
            check.formats[found.format] += 1
            check.turned += found.turned
        if found.content is not None:
            state.contents[found.content].append(name)


def _facts(name: str, files: SourceFiles, data: bytes | None, quick: bool) -> _ImageFacts:
    """Open one image or video: a file of the source's folder, or bytes that a record carries."""
    try:
        if (path := video_path(name)) is not None:
            video = (read_video if quick else check_video)(find_video(files.images, path, files.follow_links))
            shown = 0 if files.sampling is None else len(frame_indices(files.sampling, video.clip))
            return _ImageFacts(seconds=video.seconds, frames=shown)
        place: Any = safe_path(files.images, name, files.follow_links) if data is None else io.BytesIO(data)
        if not quick:
            check_image(place)
            data = place.read_bytes() if isinstance(place, Path) else data
        size, kind, turned = image_header(place, files.upright)
    except DataError as error:
        return _ImageFacts(fault=str(error) if not is_embedded(name) else _without_place(str(error), name))
    content = None if quick or data is None else hashlib.sha256(data).hexdigest()
    return _ImageFacts(size, kind, content, turned=turned)


def _without_place(message: str, name: str) -> str:
    return f"the embedded image {name[:20]}: {message.partition('>: ')[2] or message}"


def _take(
    index: int,
    record: Sample | BadRecord,
    check: SourceCheck,
    state: _State,
    render: Renderer | None,
    image_tokens: TokensBySize | None,
) -> None:
    check.records += 1
    state.ids[record.sample_id] += 1
    if isinstance(record, BadRecord):
        check.faults.append(record)
        return
    faults = [fault for name in record.images if (fault := state.seen[name].fault) is not None]
    if render is not None:
        rendered = render(record)
        supervised = len(rendered.labels) - rendered.labels.count(IGNORE_INDEX)
        faults += [] if supervised else ["no token of it would be trained on"]
    if faults:
        check.faults.append(BadRecord(index, record.sample_id, " ".join(dict.fromkeys(faults))))
        return
    if render is not None:
        counts = [_positions(state.seen[name], image_tokens) for name in record.images]
        positions = positions_of(rendered.input_ids, counts)
        check.tokens.append(sum(positions))
        if check.max_length is not None and check.tokens[-1] > check.max_length:
            check.too_long += learned_within(rendered.labels, positions, check.max_length) == 0
        check.supervised += supervised
    check.samples += 1
    check.with_system += record.system is not None
    check.greeted += record.greeted
    check.turns[len(record.turns)] += 1
    videos = sum(video_path(name) is not None for name in record.images)
    check.with_videos += videos > 0
    check.images[len(record.images) - videos] += 1
    check.words.append(sum(len(text.split()) for text in _texts(record)))
    state.conversations[_identity(record, state)].append((index, record.sample_id))


def _positions(seen: _ImageFacts, image_tokens: TokensBySize | None) -> int:
    """Tokens of an image or video; one where they are not counted."""
    if image_tokens is None or (seen.size is None and not seen.frames):
        return 1
    return image_tokens(*(seen.size or (0, 0)), seen.frames)


def _texts(sample: Sample) -> Iterator[str]:
    yield sample.system or ""
    for turn in sample.turns:
        yield from turn.texts
        yield turn.assistant or ""


def _identity(sample: Sample, state: _State) -> bytes:
    """Equal for samples that are equal in every word and in their images' content."""
    images = [state.seen[name].content or name for name in sample.images]
    turns = [[turn.texts, turn.assistant] for turn in sample.turns]
    return hashlib.sha256(json.dumps([sample.system, turns, images]).encode()).digest()


def doubling_bins(values: Sequence[int]) -> list[tuple[str, int]]:
    """Return a histogram whose bins double in width: [("0-15", n), ("16-31", n), ...], without empty ends."""
    if not values:
        return []
    edges = [0, 16]
    while edges[-1] <= max(values):
        edges.append(2 * edges[-1])
    counts = [0] * (len(edges) - 1)
    for value, count in Counter(values).items():
        counts[next(number for number, edge in enumerate(edges[1:]) if value < edge)] += count
    first = next(number for number, count in enumerate(counts) if count)
    bins = [(f"{low}-{high - 1}", count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    return bins[first:]


def short_sides(sizes: Mapping[tuple[int, int], int]) -> list[tuple[str, int]]:
    """Return a histogram of the images' shorter sides in pixels, in bins as `doubling_bins`."""
    return doubling_bins([min(size) for size, count in sizes.items() for _ in range(count)])
