"""VizWiz: the upload of test, val scored locally. Upload format from LLaVA's convert_vizwiz_for_submission.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    SHORT,
    cell,
    said,
    values,
    write_json,
    write_jsonl,
    write_parquet,
)
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.vizwiz import VizWiz

PROMPT = "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


def folder(root: Path) -> Path:
    names = ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg"]
    write_jsonl(
        root / "llava_test.jsonl", [{"question_id": n, "image": name, "text": PROMPT} for n, name in enumerate(names)]
    )
    given = [["unanswerable"] * 10, ["Coke"] * 5 + ["coke can"] * 5]
    records = [
        {
            "image": f"VizWiz_val_0000000{n}.jpg",
            "question": "WHAT?",
            "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers],
            "answer_type": kind,
            "answerable": n,
        }
        for n, (answers, kind) in enumerate(zip(given, ("unanswerable", "other"), strict=True))
    ]
    write_json(root / "Annotations/val.json", records)
    return root


def test_the_upload_has_every_image_and_its_normalised_answer(tmp_path: Path) -> None:
    items = VizWiz().load(folder(tmp_path / "vizwiz").parent)
    assert items[0].prompt == PROMPT
    assert items[0].images[0].path == tmp_path / "vizwiz/test/VizWiz_test_00000000.jpg"
    answers = said(items, "Unanswerable.", "The Coke")
    assert VizWiz().score(items, answers).counts["hidden"] == 2
    VizWiz().write_submission(items, answers, tmp_path / "upload.json")
    assert json.loads((tmp_path / "upload.json").read_text()) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "coke"},
    ]
    with pytest.raises(DataError, match=r"1 of 2 questions have no answer, e\.g\. 1\."):
        VizWiz().write_submission(items, said(items, "x", None), tmp_path / "upload.json")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("llava", [1.0, 1.0]), ("official", [0.0, 1.0]), ("lmms", [1.0, 1.0])],
)
def test_val_is_scored_locally(tmp_path: Path, variant: str, expected: list[float]) -> None:
    items = VizWiz("val").load(folder(tmp_path))
    assert items[1].prompt == PROMPT
    scores = VizWiz().score(items, said(items, "Unanswerable", "coke"), variant)
    assert values(scores) == expected
    assert scores.aggregate["answer_type/other"] == 100.0
    with pytest.raises(ConfigError, match="val is scored locally"):
        VizWiz().write_submission(items, {}, tmp_path / "upload.json")


def test_val_is_taken_where_it_lies_alone(tmp_path: Path) -> None:
    (folder(tmp_path) / "llava_test.jsonl").unlink()
    assert VizWiz().load(tmp_path)[0].question_id == "VizWiz_val_00000000.jpg"


def test_parquet_columns_score_alike(tmp_path: Path) -> None:
    row = {"question_id": "VizWiz_val_00000000", "question": "what?", "answers": ["a b"] * 10, "category": "other"}
    write_parquet(tmp_path / "data/val-00000-of-00001.parquet", [{**row, "image": cell((1, 1, 1))}])
    items = VizWiz().load(tmp_path, "hf")
    assert items[0].prompt == PROMPT
    assert VizWiz().score(items, said(items, "B"), "lmms").aggregate == {"accuracy": 100.0, "answer_type/other": 100.0}
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [{**row, "answers": None, "image": cell((1, 1, 1))}])
    items = VizWiz().load(tmp_path, "hf")
    VizWiz().write_submission(items, said(items, "B"), tmp_path / "upload.json")
    assert json.loads((tmp_path / "upload.json").read_text()) == [{"image": "VizWiz_val_00000000.jpg", "answer": "b"}]
