"""MLVU and MMVU: readers of both layouts, prompts, frames, averages, and open answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import by_id, scored, write_json, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.mlvu import MLVU, TASKS
from tinylmm.evaluation.benchmarks.mmvu import MMVU, contains_either

SUFFIX = "Answer with the option's letter from the given choices directly."


def ml(video: str, answer: str) -> dict[str, Any]:
    return {"video": video, "duration": 400.0, "question": "What?", "candidates": ["one", "two"], "answer": answer}


@pytest.fixture
def ml_root(tmp_path: Path) -> Path:
    write_json(tmp_path / "MLVU/json/1_plotQA.json", [ml("a.mp4", "two"), ml("b.mp4", "one"), ml("c.mp4", "one")])
    write_json(tmp_path / "MLVU/json/4_count.json", [ml("a.mp4", "one")])
    return tmp_path


def test_mlvu_items_have_their_tasks_folder_and_frames(ml_root: Path) -> None:
    items = MLVU().load(ml_root)
    assert [item.item_id for item in items] == ["count/0", "plotQA/0", "plotQA/1", "plotQA/2"]
    assert items[1].prompt == f"What?\n(A) one\n(B) two\n{SUFFIX}"
    video = items[1].reference["video"]
    assert video.path == ml_root / "MLVU/video/1_plotQA/a.mp4"
    assert video.sampling.given() == {"uniform": 16, "distinct": True}
    assert len(TASKS) == 7


def test_mlvu_average_is_the_mean_of_the_tasks(ml_root: Path) -> None:
    items = MLVU().load(ml_root)
    scores = scored(MLVU(), items, {"count/0": "B", "plotQA/0": "(B) two", "plotQA/1": "A", "plotQA/2": "A."})
    assert scores.aggregate == {"average": 50.0, "accuracy": 75.0, "task/count": 0.0, "task/plotQA": 100.0}
    assert scores.counts["tasks"] == 2
    empty = scored(MLVU(), items, {"count/0": ""})
    assert (empty.counts["guessed"], empty.counts["missing"]) == (1, 3)


def test_mlvu_rows_of_a_parquet_file_carry_options_in_the_question_and_a_letter(tmp_path: Path) -> None:
    row = {
        "video_name": "a.mp4",
        "question": "What?\n(A) one\n(B) two",
        "candidates": ["one", "two"],
        "answer": "B",
        "task_type": "ego",
    }
    write_parquet(tmp_path / "MLVU/data/test-00000-of-00001.parquet", [row])
    (item,) = MLVU().load(tmp_path, "hf")
    assert (item.item_id, item.prompt) == ("ego/0", f"What?\n(A) one\n(B) two\n{SUFFIX}")
    assert item.reference["answer"] == "B"
    with pytest.raises(DataError, match=r"1_plotQA\.json not found"):
        MLVU().load(tmp_path)
    write_parquet(tmp_path / "MLVU/data/test-00000-of-00001.parquet", [row | {"task_type": "summary"}])
    with pytest.raises(DataError, match="task_type 'summary' is none of count, ego"):
        MLVU().load(tmp_path, "hf")


def test_mlvu_faults_are_named(ml_root: Path) -> None:
    write_json(ml_root / "MLVU/json/1_plotQA.json", [ml("a.mp4", "three")])
    with pytest.raises(DataError, match=r"1_plotQA.json, record 1: answer 'three' is no candidate"):
        MLVU().load(ml_root)
    write_json(ml_root / "MLVU/json/1_plotQA.json", [ml("../a.mp4", "two")])
    with pytest.raises(DataError, match="must be a path inside"):
        MLVU().load(ml_root)


HUB = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main"
CHOICE = {
    "id": "validation_Biology_1",
    "video": f"{HUB}/videos/Biology/1.mp4",
    "question_type": "multiple-choice",
    "question": "Which?",
    "choices": {"A": "cell", "B": "", "C": "leaf"},
    "answer": "C",
    "metadata": {"subject": "Biology"},
}
OPEN = CHOICE | {
    "id": "validation_Art_2",
    "video": f"{HUB}/videos/Art/2.mp4",
    "question_type": "open-ended",
    "choices": {"A": "", "B": "", "C": ""},
    "answer": "Oil paint",
    "metadata": {"subject": "Art"},
}


@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_mmvu_items_of_both_layouts(tmp_path: Path, layout: Any) -> None:
    if layout == "llava":
        write_json(tmp_path / "MMVU/validation.json", [CHOICE, OPEN])
    else:
        write_parquet(tmp_path / "MMVU/data/validation-00000-of-00001.parquet", [CHOICE, OPEN])
    items = MMVU().load(tmp_path, layout)
    assert items[0].prompt == f"Which?\nA. cell\nB. \nC. leaf\n{SUFFIX}"  # an empty key is listed too
    assert items[1].prompt == "Which?\nAnswer the question directly without explanation."
    assert [item.category for item in items] == ["Biology", "Art"]
    assert items[0].reference["video"].path == tmp_path / "MMVU/videos/Biology/1.mp4"
    assert items[0].reference["video"].sampling.given() == {"fps": 1.0, "max": 64}


def test_mmvu_pools_both_kinds_and_an_empty_open_answer_counts_as_right_only_there(tmp_path: Path) -> None:
    write_json(tmp_path / "MMVU/validation.json", [CHOICE, OPEN])
    items = MMVU().load(tmp_path)
    texts = {"validation_Biology_1": "C. leaf", "validation_Art_2": ""}
    scores = scored(MMVU(), items, texts)
    assert scores.aggregate == {
        "overall": 100.0,
        "multiple-choice": 100.0,
        "open-ended": 100.0,
        "subject/Biology": 100.0,
        "subject/Art": 100.0,
    }
    assert scores.counts["unparsed"] == 1
    assert by_id(scored(MMVU(), items, texts, "strict"))["validation_Art_2"][0] == 0.0
    assert contains_either("It is oil paint.", "Oil Paint") and contains_either("oil", "Oil paint")
    assert not contains_either("ink", "Oil paint")


def test_mmvu_faults_are_named(tmp_path: Path) -> None:
    path = write_json(tmp_path / "MMVU/validation.json", [CHOICE | {"answer": "E"}])
    with pytest.raises(DataError, match="record 1: answer 'E' is no option"):
        MMVU().load(tmp_path)
    write_json(path, [CHOICE | {"question_type": "essay"}])
    with pytest.raises(DataError, match="question_type 'essay' is none of multiple-choice, open-ended"):
        MMVU().load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"validation\.json not found.*yale-nlp/MMVU"):
        MMVU().load(tmp_path)
