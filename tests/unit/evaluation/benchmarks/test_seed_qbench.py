"""SEED-Bench and Q-Bench: LLaVA's files and parquet, exact letters against lenient ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import (
    by_id,
    cell,
    given,
    png,
    scored,
    write_image,
    write_json,
    write_jsonl,
    write_parquet,
)
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.qbench import QBench
from tinylmm.evaluation.benchmarks.seed import SEED
from tinylmm.evaluation.images import open_image_ref

SUFFIX = "Answer with the option's letter from the given choices directly."
CHOICES = {"choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}
LISTED = "A. one\nB. two\nC. three\nD. four"


def seed_record(question_id: str, answer: str, kind: str, type_id: int) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "question": "How many?",
        **CHOICES,
        "answer": answer,
        "data_type": kind,
        "question_type_id": type_id,
        "data_id": f"pic_{question_id}",
    }


@pytest.fixture
def seed_root(tmp_path: Path) -> Path:
    """Two image questions and one about a video; question ids are numbers in LLaVA's file and texts in the official one."""
    folder = tmp_path / "seed_bench"
    records = [
        seed_record("101", "A", "image", 1),
        seed_record("102", "B", "image", 5),
        seed_record("v7", "C", "video", 10),
    ]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    write_json(folder / "SEED-Bench.json", {"questions": records, "question_type": types})
    text = f"How many?\n{LISTED}\n{SUFFIX}"
    write_jsonl(
        folder / "llava-seed-bench.jsonl",
        [
            {"question_id": 102, "image": "SEED-Bench-image/pic_102", "text": text, "category": "x"},
            {"question_id": 101, "image": "SEED-Bench-image/pic_101", "text": text, "category": "x"},
            {"question_id": "v7", "image": "SEED-Bench-video-image/v7.png", "text": text, "category": "x"},
        ],
    )
    return tmp_path


def test_seed_is_scored_for_images_videos_and_types(seed_root: Path) -> None:
    items = SEED().load(seed_root)
    assert [item.question_id for item in items] == [102, 101, "v7"]
    scores = scored(SEED(), items, {102: "B", 101: "B", "v7": "C"})
    assert scores.aggregate == {
        "image": 50.0,
        "video": 100.0,
        "all": 66.67,
        "type/Instances Counting": 100.0,
        "type/Scene Understanding": 0.0,
        "type/Action Recognition": 100.0,
    }
    assert next(iter(scores.aggregate)) == SEED.headline


def test_seed_wants_the_letter_alone_and_lmms_takes_the_first_character(seed_root: Path) -> None:
    items = SEED().load(seed_root)
    texts = {102: "B. two", 101: " A", "v7": ""}
    strict = scored(SEED(), items, texts)
    assert [row.score for row in strict.per_item] == [0.0, 0.0, 0.0]
    assert strict.counts == {"scored": 3, "missing": 0, "unparsed": 3}
    assert [row.score for row in scored(SEED(), items, texts, "lmms").per_item] == [1.0, 1.0, 0.0]


def test_seed_videos_are_left_out_where_their_frames_are_not_there(seed_root: Path) -> None:
    write_image(seed_root / "seed_bench/SEED-Bench-image/pic_102")
    items = SEED().load(seed_root)
    assert [item.question_id for item in items] == [102, 101]
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    scores = scored(SEED(), items, {102: "B", 101: "A", "v7": "C"})
    assert scores.aggregate["image"] == 100.0 and "all" not in scores.aggregate
    (seed_root / "seed_bench/SEED-Bench-video-image").mkdir()
    assert len(SEED().load(seed_root)) == 3


def test_seed_without_llavas_file_builds_the_same_prompts(seed_root: Path) -> None:
    with_file = {str(item.question_id): item.prompt for item in SEED().load(seed_root)}
    (seed_root / "seed_bench/llava-seed-bench.jsonl").unlink()
    assert {item.item_id: item.prompt for item in SEED().load(seed_root)} == with_file


def test_seed_upload_is_one_prediction_a_line_under_the_official_id(seed_root: Path, tmp_path: Path) -> None:
    items = SEED().load(seed_root)
    SEED().write_submission(items, given({102: "B", "v7": "C"}), tmp_path / "up.jsonl")
    assert [json.loads(line) for line in (tmp_path / "up.jsonl").read_text().splitlines()] == [
        {"question_id": "102", "prediction": "B"},
        {"question_id": "101", "prediction": ""},
        {"question_id": "v7", "prediction": "C"},
    ]


def test_seed_parquet_holds_lists_of_images(tmp_path: Path) -> None:
    record = seed_record("101", "A", "image", 1) | {"image": [cell(png())]}
    video = seed_record("v7", "B", "video", 10) | {"image": [cell(png())] * 8}
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [video, record])
    (item,) = SEED().load(tmp_path, "hf")
    assert item.prompt == f"How many?\n{LISTED}\n{SUFFIX}"
    assert open_image_ref(item.images[0]).getpixel((0, 0)) == (200, 30, 30)
    assert scored(SEED(), [item], {"101": "A"}).aggregate == {"image": 100.0, "type/1": 100.0}


def test_seed_files_that_do_not_belong_together_are_refused(seed_root: Path) -> None:
    write_json(seed_root / "seed_bench/SEED-Bench.json", {"questions": [], "question_type": {}})
    with pytest.raises(DataError, match=r"question 1: question_id 102 is not in .*SEED-Bench.json"):
        SEED().load(seed_root)


@pytest.fixture
def qbench_root(tmp_path: Path) -> Path:
    record = {"img_path": "a.png", "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "No"}
    records = [
        record | {"type": 0, "concern": 0},
        record | {"type": 1, "concern": 2, "candidates": ["Low", "Mid", "High"], "correct_ans": "High"},
    ]
    write_json(tmp_path / "qbench/llvisionqa_dev.json", records)
    write_image(tmp_path / "qbench/images_llvisionqa/a.png")
    return tmp_path


def test_qbench_prompt_and_breakdowns(qbench_root: Path) -> None:
    items = QBench().load(qbench_root)
    assert items[0].prompt == "Is it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n"
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    scores = scored(QBench(), items, {0: "B", 1: "A"})
    assert scores.aggregate == {
        "accuracy": 50.0,
        "type/Yes/No": 100.0,
        "type/How": 0.0,
        "concern/Global Distortion": 100.0,
        "concern/Local Distortion": 0.0,
    }


def test_qbench_guesses_are_fixed_and_counted(qbench_root: Path) -> None:
    items = QBench().load(qbench_root)
    first = scored(QBench(), items, {0: "B. No"})
    assert first == scored(QBench(), items, {0: "B. No"})
    assert first.counts == {"scored": 1, "missing": 1, "unparsed": 1, "guessed": 1}
    assert by_id(scored(QBench(), items, {0: "B. No"}, "lmms"))["0"] == (1.0, "B")


def test_qbench_parquet_has_not_applicable_options(tmp_path: Path) -> None:
    row = {"id": 3, "question": "Sharp?", "option0": "Yes", "option1": "No", "option2": "N/A", "option3": "N/A"}
    row |= {"correct_choice": "B", "question_type": 0, "question_concern": 3, "image": cell(png())}
    write_parquet(tmp_path / "data/dev-00000-of-00001.parquet", [row])
    (item,) = QBench().load(tmp_path, "hf")
    assert item.prompt == f"Sharp?\nA. Yes\nB. No\n{SUFFIX}"
    assert scored(QBench(), [item], {3: "B"}).aggregate["concern/Local Others"] == 100.0
