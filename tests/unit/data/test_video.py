"""Frames of real video files: the same as decoding everything and picking, and one sentence for what cannot be read."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from tests.videos import decode_all, moved_to_front, write_sound, write_video
from tinylmm.config.video import SamplingSpec
from tinylmm.data import video as module
from tinylmm.data.video import check_video, find_video, read_frames, read_video, sample_frames
from tinylmm.errors import DataError, UserError

UNEVEN = [i * 40 + i % 3 * 13 + (i > 20) * 900 for i in range(40)]
FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"frames": 100},
    "mpeg4.mp4": {"frames": 60, "codec": "mpeg4"},
    "uneven.mp4": {"frames": 40, "times": UNEVEN},
    "one.mp4": {"frames": 1},
    "two.mp4": {"frames": 2},
    "open_gop.mp4": {"frames": 80, "x264-params": "open-gop=1:keyint=10:bframes=3"},
    "hevc.mp4": {"frames": 50, "codec": "libx265", "x265-params": "log-level=none:open-gop=1:keyint=10"},
    "vp9.webm": {"frames": 40, "codec": "libvpx-vp9"},
    "hidden_frames.webm": {"frames": 50, "codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "10"},
    "no_length.mkv": {"frames": 70, "container": {"live": "1"}},
    "b_frames.avi": {"frames": 50},
    "stream.ts": {"frames": 50},
    "fragments.mp4": {"frames": 50, "container": {"movflags": "frag_keyframe+empty_moov"}},
}


def same(found: list[Image.Image], expected: list[Image.Image]) -> bool:
    return [image.tobytes() for image in found] == [image.tobytes() for image in expected]


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_decoding_everything(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **FILES[name])
    every, found = decode_all(path), read_video(path)
    assert (found.frames, found.width, found.height) == (FILES[name]["frames"], 64, 48) and len(every) == found.frames
    for index in range(0, found.frames, 7):
        assert same(read_frames(path, [index]), [every[index]]), index
    last = found.frames - 1
    some = [last, 0, last // 2, 0, *range(0, found.frames, 9)]
    assert same(read_frames(path, some), [every[index] for index in some])
    assert same(read_frames(path, range(found.frames)), every)
    assert check_video(path) == found


@pytest.mark.parametrize("name", FILES)
def test_the_length_is_told_by_the_frames(name: str, tmp_path: Path) -> None:
    found = read_video(write_video(tmp_path / name, **FILES[name]))
    expected = FILES[name]["frames"] / 25 if name != "uneven.mp4" else UNEVEN[-1] / 1000 * 40 / 39
    assert found.seconds == pytest.approx(expected, abs=0.03)
    assert found.clip.fps == pytest.approx(found.frames / expected, rel=0.02)


def test_a_header_without_a_length_is_no_hindrance(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 70, container={"live": "1"})
    with av.open(str(path)) as file:
        assert file.duration is None and not file.streams.video[0].frames
    assert sample_sizes(path, {"fps": 2}) == 5


def sample_sizes(path: Path, sampling: dict[str, Any]) -> int:
    return len(sample_frames(path, SamplingSpec(**sampling)))


def test_a_sampling_picks_its_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 100)
    every = decode_all(path)
    assert same(sample_frames(path, SamplingSpec(uniform=4)), [every[i] for i in (0, 33, 66, 99)])
    assert same(sample_frames(path, SamplingSpec(fps=1)), [every[i] for i in (0, 33, 66, 99)])
    assert same(sample_frames(path, SamplingSpec(segments=2), (1.0, 3.0)), [every[i] for i in (37, 62)])


def test_a_clip_of_one_frame_is_shown_as_often_as_asked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", 1)
    assert same(sample_frames(path, SamplingSpec(uniform=3)), decode_all(path) * 3)
    assert same(sample_frames(path, SamplingSpec(fps=1)), decode_all(path))
    assert sample_sizes(path, {"uniform": 16, "distinct": True}) == sample_sizes(path, {"left_edge": 16}) == 1


@pytest.mark.parametrize(
    ("degrees", "turn"),
    [(90, Image.Transpose.ROTATE_90), (180, Image.Transpose.ROTATE_180), (-90, Image.Transpose.ROTATE_270)],
)
def test_a_turned_clip_is_shown_upright(degrees: int, turn: Image.Transpose, tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", 30, rotation=degrees)
    every = [image.transpose(turn) for image in decode_all(path)]
    found = read_frames(path, [0, 29])
    assert same(found, [every[0], every[29]])
    assert found[0].size == ((64, 48) if degrees == 180 else (48, 64))


def test_few_frames_of_many_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mp4", 600)
    decoded = []
    forward = module._Reader._forward

    def counting(self: Any, time: int) -> Any:
        before = self._decoded
        self._decoded = (decoded.append(frame.pts) or frame for frame in before)
        found = forward(self, time)
        self._decoded = before
        return found

    monkeypatch.setattr(module._Reader, "_forward", counting)
    read_frames(path, [0, 300, 599])
    assert len(decoded) < 3 * 13, "no more than a group of pictures for each"


# ---------------------------------------------------------------------------------------------------------- refusals


def cut(path: Path, source: Path, share: float) -> Path:
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_what_cannot_be_read_is_one_sentence_with_the_file(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 100)
    text = {
        "junk.mp4": "no video at all",
        "empty.mp4": "",
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{whole}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {whole}\n",
    }
    for name, content in text.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    wrong = {tmp_path / name: "cannot be read as a video" for name in (*text, "missing.mp4", ".")}
    wrong[cut(tmp_path / "index_lost.mp4", whole, 0.5)] = "cannot be read as a video"
    front = moved_to_front(tmp_path / "front.mp4", whole)
    assert check_video(front).frames == 100
    wrong[cut(tmp_path / "cut.mp4", front, 0.7)] = "is cut short or damaged at frame"
    wrong[cut(tmp_path / "cut.mkv", write_video(tmp_path / "whole.mkv", 100), 0.5)] = "is cut short or damaged at frame"
    wrong[write_sound(tmp_path / "sound.mp4")] = "has no video, only sound (aac)"
    for path, message in wrong.items():
        for read in (check_video, read_video):
            with pytest.raises(DataError) as fault:
                read(path)
            assert str(fault.value).startswith(f"{path}: {message}") and "\n" not in str(fault.value)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        file.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16), "red"))))
        file.mux(stream.encode())
    with pytest.raises(DataError, match="has no video, no stream"):
        read_video(path)


def test_a_damaged_frame_is_not_shown(tmp_path: Path) -> None:
    path = moved_to_front(tmp_path / "clip.mp4", write_video(tmp_path / "whole.mp4", 100))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = b"\x55" * 600
    path.write_bytes(content)
    assert check_video(path).frames == 100, "its first and last frame are whole"
    with pytest.raises(DataError, match=r"clip\.mp4: (cannot be read as a video|frame \d+ of 100 cannot be decoded)"):
        read_frames(path, range(100))


def test_more_pixels_than_the_limit_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", 2)
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match="its frames have 64 x 48 pixels, more than 3,071"):
        read_video(path)


def test_a_frame_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 5)
    for indices in ([5], [-1], [0, 9]):
        with pytest.raises(DataError, match=r"has frames 0 to 4"):
            read_frames(path, indices)
    assert read_frames(path, []) == []


@pytest.mark.parametrize("name", ["front.mp4", "a.mkv", "a.ts"])
def test_fuzzed_files_give_frames_or_a_data_error_alone(name: str, tmp_path: Path) -> None:
    source = write_video(tmp_path / (name if name != "front.mp4" else "whole.mp4"), 30)
    content = (moved_to_front(tmp_path / name, source) if name == "front.mp4" else source).read_bytes()
    draw, outcomes = random.Random(name), set()
    for number in range(60):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 3, 20])):
            changed[draw.randrange(min(800, len(changed)) if number % 2 else len(changed))] = draw.randrange(256)
        path = tmp_path / f"fuzzed{Path(name).suffix}"
        path.write_bytes(changed if number % 5 else changed[: draw.randrange(len(changed))])
        try:
            outcomes.add(len(sample_frames(path, SamplingSpec(uniform=5))))
        except DataError as fault:
            outcomes.add("refused")
            assert str(fault).startswith(f"{path}: ") and "\n" not in str(fault)
    assert outcomes == {5, "refused"}


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"videos are read by PyAV.*pip install 'tinylmm\[video\]'"):
        read_video(tmp_path / "clip.mp4")


def test_no_path_leads_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    inside, outside = write_video(root / "in: 1 ü.mp4", 3), write_video(tmp_path / "out.mp4", 3)
    (root / "link.mp4").symlink_to(outside)
    assert read_video(find_video(root, "in: 1 ü.mp4")).frames == 3 and find_video(root, str(inside)) == inside
    for name in ("../out.mp4", str(outside), "link.mp4"):
        with pytest.raises(DataError, match=r"video '.*out of the image folder .* source's `images`"):
            find_video(root, name)
    assert find_video(root, "link.mp4", follow_links=True) == outside
    with pytest.raises(DataError, match=r"video 'none\.mp4': not found under"):
        find_video(root, "none.mp4")
