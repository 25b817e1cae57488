"""MVBench and Video-MME: readers, prompts, joins without ids, and parsers with all their faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import by_id, scored, write_json, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.mvbench import TASKS, MVBench, official_is_right, read_lmms
from tinylmm.evaluation.benchmarks.video import read_srt, subtitles_at
from tinylmm.evaluation.benchmarks.videomme import VideoMME, official_prompt, parse_official, subtitle_prompt

SUFFIX = "Answer with the option's letter from the given choices directly."


def mv(video: str, question: str, candidates: list[str], answer: str, **more: Any) -> dict[str, Any]:
    return {"video": video, "question": question, "candidates": candidates, "answer": answer, **more}


@pytest.fixture
def mv_root(tmp_path: Path) -> Path:
    """Two tasks; two questions of one are asked in the same words about different videos."""
    folder = tmp_path / "MVBench/json"
    write_json(
        folder / "moving_count.json",
        [
            mv("v1.mp4", "How many move?", ["1", "2", "3"], "2"),
            mv("v2.mp4", "How many move?", ["1", "2", "3"], "3"),
        ],
    )
    sequence = [mv("v3.mp4", "What first?", ["Sat.", "Ran."], "Ran.", start=1.5, end=4.0)]
    write_json(folder / "action_sequence.json", sequence)
    return tmp_path


IDS = ["action_sequence/0", "moving_count/0", "moving_count/1"]


def test_mvbench_items_come_in_the_official_order_with_their_videos(mv_root: Path) -> None:
    items = MVBench().load(mv_root)
    assert [item.item_id for item in items] == IDS
    assert items[0].prompt == f"What first?\n(A) Sat.\n(B) Ran.\n{SUFFIX}"
    video = items[0].reference["video"]
    (shown,) = items[0].images
    assert (shown.path, shown.video, shown.part, shown.fps) == (video.path, True, (1.5, 4.0), None)
    assert items[1].images[0].part is None
    assert (video.path.name, video.start, video.end, video.fps) == ("v3.mp4", 1.5, 4.0, None)
    assert items[1].reference["video"].start is None
    assert MVBench().load(mv_root / "MVBench") == items
    assert len(TASKS) == 20


def test_mvbench_frames_of_tvqa_are_three_a_second(mv_root: Path) -> None:
    episode = [mv("friends_s01", "Why?", ["a", "b"], "a", start=0, end=9)]
    write_json(mv_root / "MVBench/json/episodic_reasoning.json", episode)
    video = next(i for i in MVBench().load(mv_root) if i.category == "episodic_reasoning").reference["video"]
    assert (video.fps, video.end, video.path.parent.name) == (3.0, 9, "frames_fps3_hq")
    assert (video.shown.fps, video.shown.part) == (3.0, (0.0, 9.0))


def test_mvbench_and_videomme_ask_for_the_frames_of_their_readers(mv_root: Path, mme_root: Path) -> None:
    folder = mv_root / "MVBench/json"
    write_json(folder / "fine_grained_pose.json", [mv("S001.avi", "?", ["a"], "a"), mv("S002.WEBM", "?", ["a"], "a")])
    write_json(folder / "episodic_reasoning.json", [mv("friends", "?", ["a"], "a", start=0, end=9)])
    asked = {item.item_id: item.reference["video"].sampling.given() for item in MVBench().load(mv_root)}
    assert asked.pop("action_sequence/0") == {"uniform": 16}
    assert {name: said for name, said in asked.items() if said != {"segments": 16}} == {
        "moving_count/0": {"uniform": 16},
        "moving_count/1": {"uniform": 16},
    }
    assert len(asked) == 5
    for item in VideoMME().load(mme_root):
        assert item.reference["video"].sampling.given() == {"uniform": 16, "distinct": True}


def test_mvbench_average_is_over_all_questions(mv_root: Path) -> None:
    items = MVBench().load(mv_root)
    scores = scored(MVBench(), items, dict(zip(IDS, ["(B) Ran.", "B", "Answer: C"], strict=True)))
    # "Answer: C" begins with a letter on offer: TinyLLaVA-Video reads A
    assert scores.aggregate == {"average": 66.67, "task/action_sequence": 100.0, "task/moving_count": 50.0}
    assert by_id(scores)["moving_count/1"] == (0.0, "A")
    assert scores.counts["tasks"] == 2


def test_mvbench_empty_and_missing_answers(mv_root: Path) -> None:
    items = MVBench().load(mv_root)
    texts = {IDS[0]: "", IDS[1]: "B"}
    ours = scored(MVBench(), items, texts)
    assert ours == scored(MVBench(), items, texts)
    assert ours.counts == {"scored": 2, "missing": 1, "unparsed": 1, "guessed": 1, "tasks": 2, "left_out": 0}
    official = scored(MVBench(), items, texts, "official")
    assert by_id(official)[IDS[0]][0] == 1.0  # "(" is inside "(b)"
    lmms = scored(MVBench(), items, texts, "lmms")
    assert by_id(lmms)[IDS[0]] == (None, None)
    assert lmms.aggregate["average"] == 50.0  # the empty one leaves, the missing one is wrong


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B) Ran.", True),
        ("B", True),
        ("b)", True),
        ("B. Ran", True),  # "(b." without the stop is "(b", which is in "(b)"
        ("A) Sat", False),
        ("", True),
        ("\nB) Ran", True),
        ("Best is B", False),
        ("B)because", True),
    ],
)
def test_mvbench_official_comparison_is_of_the_first_word(text: str, right: bool) -> None:
    assert official_is_right(text, "(B) Ran.") is right


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B. Ran", "B"),
        ("b. ran", "B"),
        ("(B) Ran", "B"),
        ("The answer is C", "C"),
        ("This is a dog", "A"),  # an article is a letter too
        ("no idea", "no idea"),
        ("", ""),
    ],
)
def test_mvbench_lmms_takes_the_first_lone_letter(text: str, read: str) -> None:
    assert read_lmms(text) == read


def test_mvbench_answers_without_known_ids_are_joined_by_what_was_asked(mv_root: Path) -> None:
    items = MVBench().load(mv_root)
    count = "<image>\nHow many move?\n(A) 1\n(B) 2\n(C) 3\nOnly give the best option."
    rows = [
        {"question_id": 0, "text": "first count", "prompt": count},
        {"question_id": 1, "text": "sequence", "prompt": "<image>\n" + items[0].prompt},
        {"question_id": 2, "text": "second count", "prompt": count},
    ]
    joined = MVBench().pair(items, rows)
    assert {name: answer.text for name, answer in joined.items()} == {
        "action_sequence/0": "sequence",
        "moving_count/0": "first count",
        "moving_count/1": "second count",
    }
    with pytest.raises(DataError, match="answer 4, question_id 3: its prompt asks no question"):
        MVBench().pair(items, [*rows, {"question_id": 3, "text": "x", "prompt": count}])


def test_mvbench_ids_may_be_spelt_freely_and_numbers_are_places(mv_root: Path) -> None:
    items = MVBench().load(mv_root)
    rows = [{"question_id": name, "text": name} for name in ("Moving Count_1", "action_sequence_0", "moving-count/0")]
    assert MVBench().pair(items, rows)["moving_count/1"].text == "Moving Count_1"
    for first in (0, 1):
        numbered = [{"question_id": n + first, "text": str(n), "prompt": "?"} for n in (2, 0, 1)]
        assert [MVBench().pair(items, numbered)[name].text for name in IDS] == ["0", "1", "2"]
    with pytest.raises(DataError, match="2 answers to 3 questions have neither known ids nor prompts"):
        MVBench().pair(items, numbered[:2])
    assert MVBench().pair(items, []) == {}


def test_mvbench_faults_are_named(mv_root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"json/<task>.json not found.*OpenGVLab/MVBench"):
        MVBench().load(tmp_path / "empty")
    path = mv_root / "MVBench/json/moving_count.json"
    write_json(path, [mv("v.mp4", "?", ["1"], "2")])
    with pytest.raises(DataError, match=r"moving_count.json, record 1: answer '2' is no candidate"):
        MVBench().load(mv_root)
    write_json(path, [mv("../../etc/v.mp4", "?", ["1"], "1")])
    with pytest.raises(DataError, match="must be a path inside"):
        MVBench().load(mv_root)


@pytest.fixture
def mme_root(tmp_path: Path) -> Path:
    base = {"video_id": "001", "url": "u", "domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"}
    options = ["A. Red.", "B. Green.", "C. Blue.", "D. U.S. flag."]
    rows = [
        base
        | {"videoID": f"v{n}", "question_id": f"00{n}-1", "question": "Which?", "options": options, "answer": letter}
        | {"duration": duration}
        for n, (letter, duration) in enumerate([("B", "short"), ("C", "medium"), ("A", "long"), ("D", "long")])
    ]
    write_parquet(tmp_path / "Video-MME/videomme/test-00000-of-00001.parquet", rows)
    return tmp_path


def test_videomme_items_and_prompts(mme_root: Path) -> None:
    items = VideoMME().load(mme_root)
    listed = "A. Red.\nB. Green.\nC. Blue.\nD. U.S. flag."
    assert items[0].prompt == f"Which?\n{listed}\n{SUFFIX}"
    assert items[3].reference["options"]["D"] == "U.S. flag"  # not cut at its own ". "
    video = items[0].reference["video"]
    assert (video.path.name, video.subtitles.name) == ("v0.mp4", "v0.srt")
    assert official_prompt(items[0]) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
        f"(A, B, C, or D) of the correct option.\nWhich?\n{listed}\nThe best answer is:"
    )
    assert subtitle_prompt(items[0], ["Hi.", "Ho."]).startswith(
        "This video's subtitles are listed below:\nHi.\nHo.\nSelect"
    )
    for root in (mme_root / "Video-MME", mme_root / "Video-MME/videomme"):
        assert [item.item_id for item in VideoMME().load(root)] == [item.item_id for item in items]


def test_videomme_accuracy_per_duration_with_one_decimal(mme_root: Path) -> None:
    items = VideoMME().load(mme_root)
    scores = scored(VideoMME(), items, {"000-1": "B", "001-1": "C.", "002-1": "D", "003-1": "D. U.S. flag."})
    assert scores.aggregate == {
        "overall": 75.0,
        "short": 100.0,
        "medium": 100.0,
        "long": 50.0,
        "domain/Knowledge": 75.0,
        "task/OCR Problems": 75.0,
    }


def test_videomme_unread_answers_leave_the_official_denominator_only(mme_root: Path) -> None:
    items = VideoMME().load(mme_root)
    texts = {"000-1": "B", "001-1": "none of these", "002-1": ""}
    official = scored(VideoMME(), items, texts, "official")
    assert official.aggregate["overall"] == 50.0  # one right, two left out, one missing and wrong
    assert official.counts == {"scored": 1, "missing": 1, "unparsed": 2, "guessed": 0, "left_out": 2}
    assert scored(VideoMME(), items, texts, "lmms_regex").aggregate["overall"] == 25.0
    assert scored(VideoMME(), items, texts, "lmms").aggregate["overall"] == 25.0
    ours = scored(VideoMME(), items, texts)
    assert ours.counts == {"scored": 3, "missing": 1, "unparsed": 2, "guessed": 2, "left_out": 0}
    assert ours == scored(VideoMME(), items, texts)


@pytest.mark.parametrize(
    ("text", "official", "first", "lmms"),
    [
        ("C", "C", "C", "C"),
        ("The best answer is C", "C", "C", "C"),
        ("Answer: D", "D", "A", "D"),  # a prefix of the later script only
        ("Option: D", "D", "D", "D"),
        ("The correct answer: D", "D", "D", "D"),
        ("ANSWER: D", "A", "A", "D"),  # this spelling is no prefix
        ("Based on the film, C", "B", "B", "C"),  # the first capital anywhere, or a letter at the end
        ("The Answer is D", "A", "A", "D"),
        ("Best option: (D)", "B", "B", "D"),  # it lacks a comma in the script
        ("The best option is D", "D", "D", "D"),  # not removed either, but it has no capital before D
        ("e", None, None, None),
        ("", None, None, None),
        ("one two three four five six seven eight nine ten eleven", None, None, None),
    ],
)
def test_videomme_readings(
    mme_root: Path, text: str, official: str | None, first: str | None, lmms: str | None
) -> None:
    assert parse_official(text) == official
    items = VideoMME().load(mme_root)[:1]
    read = {
        variant: scored(VideoMME(), items, {"000-1": text}, variant).per_item[0].parsed for variant in VideoMME.variants
    }
    assert (read["official"], read["lmms_regex"], read["lmms"]) == (official, first, lmms)


def test_videomme_options_must_carry_letters(mme_root: Path) -> None:
    row = {"videoID": "v", "question_id": "1", "question": "?", "options": ["Red"], "answer": "A", "duration": "short"}
    write_parquet(mme_root / "Video-MME/videomme/test-00000-of-00001.parquet", [row])
    with pytest.raises(DataError, match=r"row 0: options must read 'A. text'"):
        VideoMME().load(mme_root)


def test_subtitles_are_those_shown_at_the_sampled_frames(tmp_path: Path) -> None:
    path = tmp_path / "v.srt"
    font = '<font color="white" size=".72c">{}</font>'
    path.write_text(
        f"1\n00:00:01,000 --> 00:00:02,500\n{font.format('One')}\n\n"
        f"2\r\n00:00:02,500 --> 00:00:04,000\r\n{font.format('Two')}\r\nlines\r\n\r\n"
        "3\n01:00:00,000 --> 01:00:01,000\n\n",
        encoding="utf-8",
    )
    subtitles = read_srt(path)
    assert [(s.start, s.end, s.text) for s in subtitles] == [
        (1.0, 2.5, "One"),
        (2.5, 4.0, "Two lines"),
        (3600, 3601, ""),
    ]
    assert subtitles_at(subtitles, [0.0, 2.5, 3.0]) == ["Two lines"]
    assert subtitles_at(subtitles, [1.0, 3.9, 3600.5]) == ["One", "Two lines"]
    with pytest.raises(DataError, match="cannot be read as subtitles"):
        read_srt(tmp_path / "none.srt")
