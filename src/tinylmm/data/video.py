"""Frames of video files, read by PyAV (extra `video`): the wanted ones alone, found by seeking, as RGB images.

Frames are numbered from 0 in the order in which they are shown. How many there are, and when each is shown, comes from the
packets of the file, not from its header: no pixel is decoded for it, a header may lie or be silent, and the time between frames
may vary. A file is read by few container formats and never leads to another one (playlists are refused). Every refusal is a
`DataError` that names the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from tinylmm.config.video import SamplingSpec
from tinylmm.constants import MAX_PIXELS
from tinylmm.data.frame_sampling import Clip, frame_indices
from tinylmm.data.images import safe_path
from tinylmm.errors import DataError, UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

T = TypeVar("T")

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "gif", "mpegts", "mpeg", "flv", "asf", "ogg")
"""By FFmpeg's names; no playlist, which could name files elsewhere."""
_UNCOUNTED = ("vp8", "avi")
"""A codec with packets that show no frame, and a container that does not say when a frame is shown."""
_MATROSKA = "matroska,webm"
_SLACK = 0.25
"""Seconds that a header's length may be beyond the last packet of any stream."""
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Video:
    """What a video file is, without its pixels.

    Attributes:
        width, height: of a frame as it is stored, in pixels, before it is turned.
        frames: how many it has.
        seconds: from the first frame's beginning to the last one's end.
        times: of each frame in units of the file's clock, ascending; empty where only decoding tells.
        keys: of the frames that decoding can begin at: time shown, and time to seek to.
    """

    width: int
    height: int
    frames: int
    seconds: float
    times: tuple[int, ...] = field(repr=False)
    keys: tuple[tuple[int, int], ...] = field(repr=False)

    @property
    def clip(self) -> Clip:
        """It as samplers see it; its rate is the average one."""
        return Clip(self.frames, self.frames / self.seconds, self.seconds)


def find_video(root: Path, name: str, follow_links: bool = False) -> Path:
    """Return the file of a video, by the rules for images.

    Raises:
        DataError: as `safe_path`.
    """
    return safe_path(root, name, follow_links, what="video")


def read_video(path: Path) -> Video:
    """Return what a file holds.

    Raises:
        DataError: not one of CONTAINERS, without a video stream or a frame, damaged, cut short, or of more than MAX_PIXELS.
        UserError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        return _index(path, container, stream)


def sample_frames(path: Path, sampling: SamplingSpec, part: tuple[float, float] | None = None) -> list[Image.Image]:
    """Return the frames that a sampling chooses, in order; one that is chosen twice is there twice.

    Args:
        part: as `frame_indices`.

    Raises:
        DataError, UserError: as `read_frames`.
    """
    with _opened(path) as (container, stream):
        video = _index(path, container, stream)
        return _frames(path, container, stream, video, frame_indices(sampling, video.clip, part), _image)


def read_frames(path: Path, indices: Sequence[int]) -> list[Image.Image]:
    """Return frames by their numbers, in the order of `indices`, as RGB and turned as the file says.

    Raises:
        DataError: as `read_video`; or there is no such frame, or it cannot be decoded.
        UserError: PyAV is not installed.
    """
    return see_frames(path, indices, lambda image: image)


def see_frames(path: Path, indices: Sequence[int], see: Callable[[Image.Image], T]) -> list[T]:
    """Return what `see` makes of frames, as `read_frames` gives them; no more than one image is in memory at a time.

    Raises:
        DataError, UserError: as `read_frames`.
    """
    with _opened(path) as (container, stream):
        video = _index(path, container, stream)
        return _frames(path, container, stream, video, indices, lambda frame: see(_image(frame)))


def see_chosen(
    path: Path, choose: Callable[[Video], Sequence[int]], see: Callable[[Image.Image], T], check: Callable[[], None]
) -> list[T]:
    """Return what `see` makes of the frames that `choose` names, as `see_frames`, within limits.

    Args:
        choose: may refuse the video, before a frame of it is decoded.
        check: called for each packet that is read and each frame that is decoded; raises where it has been enough.

    Raises:
        DataError, UserError: as `read_frames`.
    """
    with _opened(path) as (container, stream):
        video = _index(path, container, stream, check)
        chosen = choose(video)
        return _frames(path, container, stream, video, chosen, lambda frame: see(_image(frame)), check)


def choose_frames(path: Path, sampling: SamplingSpec) -> list[int]:
    """Return the numbers of the frames that a sampling chooses, each of which was decoded to see that it can be.

    Raises:
        DataError, UserError: as `read_frames`.
    """
    with _opened(path) as (container, stream):
        video = _index(path, container, stream)
        indices = frame_indices(sampling, video.clip)
        _frames(path, container, stream, video, indices, lambda frame: None)
        return indices


def check_video(path: Path) -> Video:
    """Return what a file holds, after its first and its last frame were decoded.

    Raises:
        DataError, UserError: as `read_frames`.
    """
    with _opened(path) as (container, stream):
        video = _index(path, container, stream)
        _frames(path, container, stream, video, [0, video.frames - 1], lambda frame: None)
        return video


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream; what FFmpeg finds wrong in between becomes a DataError."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{path}: videos are read by PyAV, which is not installed here. Install it with `pip install 'tinylmm[video]'`."
        ) from error
    safe = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    try:
        with av.open(str(path.absolute()), options=safe, metadata_errors="replace") as container:
            yield container, _stream(path, container)
    except (av.FFmpegError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a video ({reason}). Fetch or convert it again.") from error


def _stream(path: Path, container: InputContainer) -> VideoStream:
    import av.stream

    cover = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & cover), None)
    if stream is None:
        sound = [s.codec_context.name for s in container.streams.audio if s.codec_context is not None]
        found = f"only sound ({sound[0]})" if sound else "no stream"
        raise DataError(f"{path}: has no video, {found}. Correct the record, or leave it out.")
    if stream.codec_context is None:
        raise DataError(f"{path}: is in a codec that FFmpeg does not know here. Fetch or convert it again.")
    _check_size(path, stream.codec_context.width, stream.codec_context.height)
    stream.thread_count = 1  # each of many workers reads a file of its own
    return stream


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: its frames have {width} x {height} pixels, more than {MAX_PIXELS:,}. Scale it down.")


def _nothing() -> None:
    """No limit."""


def _each(items: Iterator[T], check: Callable[[], None]) -> Iterator[T]:
    for item in items:
        check()
        yield item


def _index(path: Path, container: InputContainer, stream: VideoStream, check: Callable[[], None] = _nothing) -> Video:
    """Read all packets, or, where they do not tell the frames, all frames."""
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    last, end, stored = 0, 0.0, 0
    told = stream.codec_context.codec.name not in _UNCOUNTED and container.format.name not in _UNCOUNTED
    for packet in _each(container.demux(), check):
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index or packet.size == 0:
            continue
        if packet.is_corrupt:
            raise _cut_short(path, len(shown))
        stored += 1
        if packet.is_discard:
            continue
        told = told and packet.pts is not None
        shown.append(packet.pts or 0)
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        last = packet.duration or 0
    suspect = stored < stream.frames or container.format.name == _MATROSKA  # which counts no frames
    if suspect and (container.duration or 0) / 1e6 > end + _SLACK:
        raise _cut_short(path, len(shown))
    times = sorted(shown)
    told = told and len(set(times)) == len(times) and bool(keys) and min(keys)[0] <= times[0]
    if not told:
        container.seek(0, stream=stream)
        times = [frame.pts or 0 for frame in _each(container.decode(stream), check)]
    if not times:
        raise DataError(f"{path}: has a video stream without a frame. Fetch it again, or leave its record out.")
    seconds = _seconds(times, last, stream)
    size = stream.codec_context.width, stream.codec_context.height
    return Video(*size, len(times), seconds, tuple(times) if told else (), tuple(sorted(keys)) if told else ())


def _cut_short(path: Path, frame: int) -> DataError:
    return DataError(f"{path}: is cut short or damaged at frame {frame}. Fetch it again.")


def _seconds(times: Sequence[int], last: int, stream: VideoStream) -> float:
    """Length of a clip; `last` is the last frame's, 0 if unknown, which then lasts as long as those before it on average."""
    span = times[-1] - times[0]
    if span > 0 and stream.time_base:
        return float((span + (last or span / (len(times) - 1))) * stream.time_base)
    if last and stream.time_base and len(times) == 1:
        return float(last * stream.time_base)
    return len(times) / float(stream.average_rate or 1)


def _frames(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    video: Video,
    indices: Sequence[int],
    see: Callable[[VideoFrame], T],
    check: Callable[[], None] = _nothing,
) -> list[T]:
    """What `see` makes of frames, each of which is decoded once."""
    wanted = sorted(set(indices))
    if outside := [index for index in wanted if not 0 <= index < video.frames]:
        raise DataError(f"{path}: frame {outside[0]} was asked for, but it has frames 0 to {video.frames - 1}.")
    reader = _Reader(container, stream, check)
    found: dict[int, T] = {}
    for index in wanted:
        frame = reader.at(video, index) if video.times else reader.counted(index)
        if frame is None or frame.is_corrupt:
            raise DataError(f"{path}: frame {index} of {video.frames} cannot be decoded. Fetch the file again.")
        _check_size(path, frame.width, frame.height)  # which may change within a file
        found[index] = see(frame)
    return [found[index] for index in indices]


class _Reader:
    """Decodes forward, and seeks where that saves decoding."""

    def __init__(self, container: InputContainer, stream: VideoStream, check: Callable[[], None]) -> None:
        self._container, self._stream, self._check = container, stream, check
        self._decoded: Iterator[VideoFrame] | None = None
        self._number, self._time = -1, -1

    def at(self, video: Video, index: int) -> VideoFrame | None:
        """The frame shown at one of `video.times`, later than any asked for before; None if it does not come."""
        time = video.times[index]
        key = max(0, bisect_right(video.keys, (time, float("inf"))) - 1)
        if self._decoded is None or self._time < video.keys[key][0]:
            self._seek(video.keys[key][1])
        frame = self._forward(time)
        while frame is not None and frame.pts != time and key > 0:
            key -= 1  # FFmpeg began behind it: frames shown before a key frame may be stored behind it
            self._seek(video.keys[key][1])
            frame = self._forward(time)
        return frame if frame is not None and frame.pts == time else None

    def counted(self, index: int) -> VideoFrame | None:
        """The frame of a number larger than any asked for before, counted while decoding from the start."""
        if self._decoded is None:
            self._seek(0)
        while self._decoded is not None and self._number < index:
            self._number += 1
            frame = next(self._decoded, None)
            if frame is None or self._number == index:
                return frame
        return None

    def _seek(self, time: int) -> None:
        self._container.seek(time, stream=self._stream, backward=True)
        self._decoded = _each(self._container.decode(self._stream), self._check)

    def _forward(self, time: int) -> VideoFrame | None:
        """The first frame from here that is not shown before `time`."""
        for frame in self._decoded or ():
            self._time = self._time if frame.pts is None else frame.pts
            if self._time >= time:
                return frame
        return None


def _image(frame: VideoFrame) -> Image.Image:
    turn: Any = _TURNS.get(round(frame.rotation) % 360)
    image = frame.to_image()
    return image if turn is None else image.transpose(turn)
