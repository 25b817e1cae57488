"""LongVideoBench: both layouts, subtitles among the frames, scores; and what is asked of a model with subtitles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import tiny_loaded
from tests.unit.evaluation.benchmarks.disk import by_id, scored, write_json, write_parquet
from tests.unit.stages.test_evaluate import job_of, lines
from tests.videos import write_video
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.longvideobench import LongVideoBench, interleaved, read_subtitles
from tinylmm.evaluation.benchmarks.video import Subtitle
from tinylmm.evaluation.benchmarks.videomme import VideoMME
from tinylmm.models.checkpoint import save_model
from tinylmm.stages import evaluate

SUFFIX = "Answer with the option's letter from the given choices directly."
LISTED = f"Who leaves?\nA. Tom. He runs\nB. Ann\n{SUFFIX}"


def record(name: str, correct: int = 0, group: int = 15, **more: Any) -> dict[str, Any]:
    """A record with the fields that the published files have."""
    return {
        "video_id": name,
        "question": "Who leaves?",
        "question_wo_referring_query": "Who leaves?",
        "candidates": ["Tom. He runs", "Ann"],
        "correct_choice": correct,
        "position": [3],
        "topic_category": "MV-Movie-Recaps",
        "question_category": "S2E",
        "level": "L1-Perception",
        "id": f"{name}_0",
        "video_path": f"{name}.mp4",
        "subtitle_path": f"{name}_en.json",
        "duration_group": group,
        "starting_timestamp_for_subtitles": 100,
        "duration": 8.0,
        "view_count": 1,
        **more,
    }


SUBTITLES = [
    {"timestamp": [100.0, 103.0], "text": "Hello"},
    {"timestamp": [103.2, 103.4], "text": "unseen"},  # a second around 3.3 holds a frame at 3, though
    {"timestamp": [106.5, None], "text": "to the end"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "LongVideoBench"
    write_json(folder / "lvb_val.json", [record("a"), record("b", 1, 3600, question_category="TOS")])
    write_json(folder / "subtitles/a_en.json", SUBTITLES)
    write_json(folder / "subtitles/b_en.json", [])
    return tmp_path


def test_items_have_the_loaders_frames_and_the_official_options(root: Path) -> None:
    first, second = LongVideoBench().load(root)
    assert (first.item_id, first.prompt, first.options) == ("a_0", LISTED, 2)
    assert first.reference["answer"] == "A" and second.reference["answer"] == "B"
    (shown,) = first.images
    assert shown.video and shown.path == root / "LongVideoBench/videos/a.mp4" and shown.part is None
    assert shown.sampling is not None and shown.sampling.given() == {"left_edge": 16}
    assert [item.item_id for item in LongVideoBench().load(root / "LongVideoBench")] == ["a_0", "b_0"]


def test_the_parquet_file_has_up_to_five_options(tmp_path: Path) -> None:
    row = {key: value for key, value in record("a", 1).items() if key != "candidates"}
    row |= {"option0": "Tom. He runs", "option1": "Ann", "option2": "N/A", "option3": "N/A", "option4": "N/A"}
    write_parquet(tmp_path / "LongVideoBench/validation-00000-of-00001.parquet", [row])
    (item,) = LongVideoBench(subtitles=False).load(tmp_path, "hf")
    assert (item.prompt, item.reference["answer"]) == (LISTED, "B")
    with pytest.raises(DataError, match=r"lvb_val.json not found.*LongVideoBench"):
        LongVideoBench().load(tmp_path)


def test_subtitles_stand_among_the_frames_as_the_loader_puts_them(root: Path) -> None:
    item = LongVideoBench().load(root)[0]
    asked = LongVideoBench().prompt_at(item, lambda: [0.0, 1.0, 2.0, 3.0, 4.0, 7.0])
    told = "[image][image]Hello[image][image]unseen[image][image]to the end"  # the sixth frame is at 7
    assert asked == f"subtitles:{told}\nquestion: \n{LISTED}"
    assert LongVideoBench(subtitles=False).prompt_at(item, list) == LISTED


@pytest.mark.parametrize(
    ("subtitle", "times", "told"),
    [
        ((1.0, 3.0), [0.0, 2.0, 4.0], ["[image]", "[image]", "x", "[image]"]),
        ((1.0, 3.0), [0.0, 1.0, 3.0], ["[image]", "[image]", "[image]"]),  # at its ends no frame is inside
        ((1.0, 1.2), [0.7, 2.0], ["[image]", "x", "[image]"]),  # widened to a second around 1.1
        ((1.0, 1.2), [0.5, 2.0], ["[image]", "[image]"]),
        ((5.0, 9.0), [], []),
    ],
)
def test_a_subtitle_is_told_where_a_frame_lies_inside_it(
    subtitle: tuple[float, float], times: list[float], told: list[str]
) -> None:
    assert interleaved([Subtitle(*subtitle, "x")], times) == told


def test_both_forms_of_subtitle_files_are_read(root: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path / "s.json", [{"start": "00:01:40.500", "end": "0:01:42", "line": "Hi"}])
    assert read_subtitles(path, 100, 8) == (Subtitle(0.5, 2.0, "Hi"),)
    assert read_subtitles(root / "LongVideoBench/subtitles/a_en.json", 100, 8)[2] == Subtitle(6.5, 8.0, "to the end")
    write_json(path, [{"begin": 3}])
    with pytest.raises(DataError, match=r"s.json, subtitle 1: .* has no times and text"):
        read_subtitles(path, 0, 8)


def test_scores_are_pooled_and_by_duration_and_category(root: Path) -> None:
    items = LongVideoBench().load(root)
    scores = scored(LongVideoBench(), items, {"a_0": "A", "b_0": "A"})
    assert scores.aggregate == {
        "overall": 50.0,
        "duration/15": 100.0,
        "duration/3600": 0.0,
        "category/S2E": 100.0,
        "category/TOS": 0.0,
    }
    empty = scored(LongVideoBench(), items, {"a_0": ""})
    assert (empty.counts["guessed"], empty.counts["missing"], empty.counts["left_out"]) == (1, 1, 0)
    assert by_id(scored(LongVideoBench(), items, {"a_0": "none", "b_0": "So B"}, "lmms"))["b_0"] == (1.0, "B")


def test_faults_are_named(root: Path) -> None:
    path = root / "LongVideoBench/lvb_val.json"
    for broken, message in {
        "no place among": record("a", 2),
        "must be a path inside": record("a", video_path="../a.mp4"),
        "video '../s.json' must be a path inside": record("a", subtitle_path="../s.json"),
        "field question missing": {key: value for key, value in record("a").items() if key != "question"},
    }.items():
        write_json(path, [message])
        with pytest.raises(DataError, match=rf"lvb_val.json, record 1: .*{broken}"):
            LongVideoBench().load(root)
    write_json(path, [record("c")])
    (item,) = LongVideoBench().load(root)
    with pytest.raises(DataError, match=r"c_en.json: the subtitles of question c_0 are not there"):
        LongVideoBench().prompt_at(item, list)


def asked_of_a_model(folder: Path, benchmark: Benchmark, root: Path, **spec: Any) -> list[str]:
    """What a model is asked, one of three frames a second of a clip of eight seconds among them."""
    save_model(tiny_loaded(), folder / "train/output/model", None, {})
    (folder / "data").symlink_to(root)
    job = job_of(folder, folder / "train/output", benchmark=benchmark.name, max_new_tokens=2, **spec)
    evaluate.run(job)
    return [line["prompt"] for line in lines(job.output / "generations.jsonl")]


def test_a_model_is_asked_with_the_subtitles_of_the_frames_it_is_shown(root: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_video_of_seconds(root / f"LongVideoBench/videos/{name}.mp4", 8)
    prompts = asked_of_a_model(tmp_path / "work", LongVideoBench(), root, template="llama")
    frames = "[image]" * 8  # one a second of eight
    assert prompts[1] == f"subtitles:{frames}\nquestion: \n{LISTED}"
    first = "[image][image]Hello[image][image]unseen[image][image][image][image]"
    assert prompts[0] == f"subtitles:{first}to the end\nquestion: \n{LISTED}"


def write_video_of_seconds(path: Path, seconds: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, seconds * 5 + 2, times=[number * 200 for number in range(seconds * 5 + 2)])


def test_videomme_with_subtitles_asks_as_its_authors_do(tmp_path: Path) -> None:
    row = {"videoID": "v", "question": "Which?", "options": ["A. Red.", "B. Blue."], "answer": "A", "duration": "short"}
    rows = [row | {"question_id": "1"}, row | {"question_id": "2", "videoID": "mute"}]
    write_parquet(tmp_path / "Video-MME/videomme/test-00000-of-00001.parquet", rows)
    path = tmp_path / "Video-MME/subtitle/v.srt"
    path.parent.mkdir()
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nRed!\n\n2\n00:00:05,000 --> 00:00:06,000\nBlue!\n")
    asking = VideoMME(subtitles=True)
    first, mute = asking.load(tmp_path)
    assert asking.prompt_at(first, lambda: [0.0, 1.5]).startswith(
        "This video's subtitles are listed below:\nRed!\nSelect the best answer"
    )
    assert asking.prompt_at(mute, lambda: [1.5]).startswith("This video's subtitles are listed below:\n\nSelect")
    assert VideoMME().load(tmp_path)[0].prompt == f"Which?\nA. Red.\nB. Blue.\n{SUFFIX}"
    assert "subtitles" not in VideoMME().load(tmp_path)[0].reference, "in no older digest"
