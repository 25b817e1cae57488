"""The embedded video data set: real MP4 files, the same every time, read by the same readers as any other."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_embedded import contents
from tinylmm.config.video import SamplingSpec
from tinylmm.data.moving_digits import RECORDS, build_moving_digits, write_clip
from tinylmm.data.parades import LENGTHS, RATE
from tinylmm.data.video import read_frames, read_video, sample_frames
from tinylmm.errors import ConfigError, UserError

SMALL = {"frames": 5, "clips": 4, "text": 6, "test": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    summary = build_moving_digits(folder, seed=0, **SMALL)
    assert (summary["videos"], summary["images"]) == (4 + 3, 5)
    assert summary["encoder"]["codec"] == "libx264" and summary["encoder"]["libavcodec"]
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_the_same_seed_writes_the_same_bytes_over_whatever_a_killed_try_left(built: Path, tmp_path: Path) -> None:
    (tmp_path / "videos" / "test").mkdir(parents=True)
    (tmp_path / "videos" / "test" / "000001.mp4").write_bytes(b"half a fi")
    build_moving_digits(tmp_path, seed=0, **SMALL)
    assert contents(tmp_path) == contents(built)


def test_a_record_depends_on_its_index_and_its_seed_and_not_on_how_many_there_are(built: Path, tmp_path: Path) -> None:
    for name in ("longer", "other"):
        (tmp_path / name).mkdir()
    build_moving_digits(tmp_path / "longer", seed=0, **{name: count + 1 for name, count in SMALL.items()})
    build_moving_digits(tmp_path / "other", seed=1, **SMALL)
    for name in ("frames.json", "pretrain.json", "finetune.json", "text.json"):
        assert records(tmp_path / "longer" / name)[:-1] == records(built / name)
        assert records(tmp_path / "other" / name) != records(built / name)


def test_clips_are_real_files_of_a_few_seconds(built: Path) -> None:
    for path in sorted(built.glob("videos/*/*.mp4")):
        video = read_video(path)
        assert (video.width, video.height) == (32, 32)
        assert video.frames in LENGTHS
        assert video.seconds == pytest.approx(video.frames / RATE)
        assert len(sample_frames(path, SamplingSpec(uniform=4))) == 4


def test_what_is_read_is_what_was_drawn_but_for_the_codec(tmp_path: Path) -> None:
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    for number in range(6):
        frames[number, 8:24, 4 * number : 4 * number + 8] = 230
    write_clip(tmp_path / "clip.mp4", frames)
    read = np.stack([np.asarray(image) for image in read_frames(tmp_path / "clip.mp4", range(6))])
    assert np.abs(read.astype(int) - frames).mean() < 6


def test_captions_and_questions_are_about_the_same_clips_and_begin_with_them(built: Path) -> None:
    captions, questions = records(built / "pretrain.json"), records(built / "finetune.json")
    assert [record["video"] for record in captions] == [record["video"] for record in questions]
    for record in captions + questions:
        assert (built / "videos" / record["video"]).is_file()
        assert record["conversations"][0]["value"].startswith("<video>\n")
    assert {len(record["conversations"]) for record in captions} == {2}
    assert {len(record["conversations"]) for record in questions} <= {10, 12}
    assert all("video" not in record and "image" not in record for record in records(built / "text.json"))
    assert all((built / "images" / record["image"]).is_file() for record in records(built / "frames.json"))


def test_no_clip_is_both_trained_on_and_asked_about(built: Path) -> None:
    trained = {record["video"] for record in records(built / "finetune.json")}
    asked = {record["video"] for record in records(built / "test.jsonl")}
    assert trained and asked and trained.isdisjoint(asked)
    assert {name.partition("/")[0] for name in asked} == {"test"}
    pictures = [path.read_bytes() for path in sorted(built.glob("videos/*/*.mp4"))]
    assert len(set(pictures)) == len(pictures)


def test_every_question_has_its_own_id_and_says_what_a_guesser_chooses_from(built: Path) -> None:
    lines = records(built / "test.jsonl")
    assert len({line["question_id"] for line in lines}) == len(lines)
    assert {line["category"] for line in lines} >= {"direction", "leaves_first", "count"}
    assert all(line["options"] in (2, 3, 4) for line in lines)


def test_unknown_options_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build_moving_digits(tmp_path, seed=0, clip=3)  # type: ignore[call-arg]
    assert f"data.build.options.clip: is not an option of moving digits; there are {', '.join(RECORDS)}." in str(
        refused.value
    )


def test_without_pyav_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"PyAV, which is not installed here. Install it with `pip install 'tinylmm\[video\]'`"
    ):
        build_moving_digits(tmp_path, seed=0, **SMALL)
