"""Records with videos, in every layout, and what a check of them finds in real files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.builders import tiny_tokenizer
from tests.videos import moved_to_front, write_sound, write_video
from tinylmm.config.video import SamplingSpec
from tinylmm.data.chat import get_template
from tinylmm.data.check import SourceCheck, SourceFiles, check_source
from tinylmm.data.sample import BadRecord, Sample, parse_record
from tinylmm.reports.data_text import source_counts, verdict

ANSWER = {"from": "gpt", "value": "a"}


def llava(question: str, **fields: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": [{"from": "human", "value": question}, ANSWER], **fields}


def openai(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], **fields}


def part(name: str, value: Any) -> dict[str, Any]:
    return {"type": name, name: value}


TEXT = {"type": "text", "text": "what?"}
GOOD: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "tinyllava-video": ("llava", llava("<image>\nwhat?", video="a/b.mp4"), ("video:a/b.mp4",)),
    "its own slot": ("llava", llava("<video>\nwhat?", video="b.mp4"), ("video:b.mp4",)),
    "two": ("llava", llava("<video> and <video>?", video=["a.mp4", "b.mp4"]), ("video:a.mp4", "video:b.mp4")),
    "with an image": (
        *("llava", llava("<video> or <image>?", image="a.png", video="b.mp4")),
        ("video:b.mp4", "a.png"),
    ),
    "sharegpt": ("sharegpt", llava("<video>what?", videos=["b.mp4"], system="s"), ("video:b.mp4",)),
    "openai's key": ("openai", openai("<video>\nwhat?", videos=["b.mp4"]), ("video:b.mp4",)),
    "openai's part": (
        *("openai", openai([part("video_url", {"url": "b.mp4"}), TEXT])),
        ("video:b.mp4",),
    ),
    "openai's parts": (
        *("openai", openai([TEXT, part("video", "b.mp4"), part("image_url", {"url": "a.png"})])),
        ("video:b.mp4", "a.png"),
    ),
    "parquet": ("parquet", llava("<image>what?", video={"path": "b.mp4", "bytes": None}), ("video:b.mp4",)),
    "cauldron": ("auto", {"texts": [{"user": "q", "assistant": "a"}], "video": "b.mp4"}, ("video:b.mp4",)),
    "no video": ("llava", llava("<image> what is a <video>?", image="a.png", videos=[]), ("a.png",)),
}


@pytest.mark.parametrize("name", GOOD)
def test_videos_stand_among_the_images_in_the_order_of_their_slots(name: str) -> None:
    layout, record, names = GOOD[name]
    sample = parse_record(0, record, layout, videos=True)
    assert isinstance(sample, Sample), sample
    assert sample.images == names
    assert sum(turn.num_images for turn in sample.turns) == len(names)
    assert ("<video>" in sample.turns[0].user) == (name == "no video"), "where there is no video it is a word"
    trained = parse_record(0, record, layout)
    if name == "no video":
        assert trained == sample
    else:
        assert isinstance(trained, BadRecord) and "nothing says which frames of it to show" in trained.reason


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "slots": ("llava", llava("<video><video>", video="a.mp4"), "2 slots for videos but the record names 1 videos"),
    "image slots": ("llava", llava("<video><image>", video="a.mp4"), "1 slots for images but the record names 0"),
    "unclear": ("llava", llava("<image><image>", video="a.mp4", image="a.png"), "no <video> in its questions says where"),
    "no slot": ("llava", llava("what?", video="a.mp4"), "0 <image> but the record names 1"),
    "both keys": ("llava", llava("<video>", video="a.mp4", videos=["b.mp4"]), "both `video` and `videos`; keep one"),
    "bytes": ("parquet", llava("<video>", video={"bytes": b"x", "path": None}), "video 0 is embedded in the record"),
    "data": ("openai", openai([part("video_url", {"url": "data:video/mp4;base64,AA"})]), "video 0 is embedded"),
    "network": ("openai", openai([part("video_url", {"url": "https://x/a.mp4"})]), "video 0 is at an address"),
    "number": ("llava", llava("<video>", video=5), "`video` must be a path or a list of paths, but holds 5"),
    "in an answer": (
        *("openai", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [part("video", "a")]}]}),
        "only questions can have images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_record_is_said(name: str) -> None:
    layout, record, reason = BAD[name]
    bad = parse_record(0, record, layout, videos=True)
    assert isinstance(bad, BadRecord) and reason in bad.reason


def checked(root: Path, records: list[Any], quick: bool = False) -> SourceCheck:
    (root / "records.json").write_text(json.dumps(records), encoding="utf-8")
    return check_source(SourceFiles("videos", root / "records.json", root / "media", "llava", None), quick=quick)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    media = tmp_path / "media"
    media.mkdir()
    write_video(media / "a.mp4", 100)
    write_video(media / "b.mp4", 50)
    Image.new("RGB", (8, 8), "red").save(media / "a.png")
    return tmp_path


def test_a_check_of_images_videos_and_text_counts_each(root: Path) -> None:
    records = [
        *(llava("<image>?", video="a.mp4"), llava("<video>!", video="b.mp4"), llava("<video> again", video="a.mp4")),
        *(llava("<image>", image="a.png"), llava("text"), llava("<image><video>", image="a.png", video="b.mp4")),
    ]
    found = checked(root, records)
    assert not found.faults and found.problem is None and found.samples == 6
    assert (found.with_videos, sorted(found.seconds)) == (4, [2.0, 4.0])
    assert found.images == {0: 4, 1: 2} and dict(found.sizes) == {(8, 8): 1}
    rows = dict(source_counts(found))
    assert (rows["with a video"], rows["different videos"], rows["length of the videos"]) == ("4", "2", "0.1 minutes")
    assert not found.clean and "4 have videos, and nothing says which frames of them to show" in verdict(found)
    sampling = SamplingSpec(fps=2)
    files, tokenizer = replace(found.files, sampling=sampling), tiny_tokenizer()
    template = get_template("llama").fitted(tokenizer)
    counted = check_source(
        files,
        render=lambda sample: template.render(sample.turns, tokenizer, sample.system),
        image_tokens=lambda width, height, frames: 1000 * frames if frames else 1,
    )
    assert counted.clean and verdict(counted) == "all 6 records can be used."
    assert [tokens // 1000 for tokens in counted.tokens] == [8, 4, 8, 0, 0, 4], "4 and 2 seconds at 2 frames a second"


def test_a_check_names_every_broken_video_with_its_reason(root: Path) -> None:
    media = root / "media"
    write_sound(media / "sound.mp4")
    front = moved_to_front(media / "front.mp4", media / "a.mp4")
    (media / "cut.mp4").write_bytes(front.read_bytes()[: front.stat().st_size * 7 // 10])
    content = bytearray(front.read_bytes())
    content[-1500:] = b"\x55" * 1500
    (media / "last.mp4").write_bytes(content)
    write_video(root / "outside.mp4", 2)
    (media / "link.mp4").symlink_to(root / "outside.mp4")
    reasons = {
        "sound.mp4": "has no video, only sound (aac)",
        "cut.mp4": "is cut short or damaged at frame",
        "last.mp4": "last.mp4: ",
        "gone.mp4": "video 'gone.mp4': not found under",
        "../outside.mp4": "leads out of the image folder",
        "link.mp4": "leads out of the image folder",
        "a.png": "cannot be read as a video",
    }
    found = checked(root, [llava("<video>", video=name) for name in ["a.mp4", *reasons]])
    assert found.samples == 1 and [bad.index for bad in found.faults] == list(range(1, 8))
    for bad, reason in zip(found.faults, reasons.values(), strict=True):
        assert reason in bad.reason and "\n" not in bad.reason
    quick = checked(root, [llava("<video>", video="last.mp4")], quick=True)
    assert not quick.faults, "frames are not decoded"
