"""GQA: exact answers and breakdowns. Cases worked out by hand from GQA's eval.py and LLaVA's convert_gqa_for_eval.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import SHORT, cell, gqa_folder, parsed, said, values, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.gqa import GQA, llava_text, lmms_text
from tinylmm.evaluation.images import open_image_ref

TEXTS = ("cat", "Dog.", "t-shirt", "right", "no..", " yes")
"""To the questions in the order of the question file: 205 (not balanced), 204, ..., 200."""


def test_items_follow_the_question_file(tmp_path: Path) -> None:
    items = GQA().load(gqa_folder(tmp_path / "gqa").parent)
    assert [item.question_id for item in items] == ["205", "204", "203", "202", "201", "200"]
    assert items[5].prompt == "Is it ?" + SHORT
    assert items[5].images[0].path == tmp_path / "gqa/data/images/n0.jpg"
    assert [item.options for item in items] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("llava", [None, 1.0, 1.0, 0.0, 1.0, 0.0]),  # all final periods off, lower case, not stripped
        ("official", [None, 0.0, 1.0, 0.0, 0.0, 0.0]),  # as it is
        ("lmms", [None, 1.0, 1.0, 0.0, 1.0, 0.0]),
    ],
)
def test_variants_differ_in_what_they_normalise(tmp_path: Path, variant: str, expected: list[float | None]) -> None:
    items = GQA().load(gqa_folder(tmp_path))
    assert values(GQA().score(items, said(items, *TEXTS), variant)) == expected


def test_only_lmms_ignores_punctuation_inside() -> None:
    assert lmms_text("T-Shirt!") == lmms_text("tshirt") == "tshirt"
    assert llava_text("T-Shirt..") == "t-shirt"
    assert llava_text("yes. ") == "yes. "


def test_metrics_by_type_and_length(tmp_path: Path) -> None:
    items = GQA().load(gqa_folder(tmp_path))
    scores = GQA().score(items, said(items, *TEXTS))
    assert scores.counts == {"scored": 5, "missing": 0, "unparsed": 0, "unbalanced": 1}
    assert parsed(scores) == [None, "dog", "t-shirt", "right", "no", " yes"]
    figures = dict(scores.aggregate)
    assert figures.pop("accuracy") == 60.0  # dog, t-shirt, no of five balanced ones
    assert figures.pop("binary") == 33.33  # structural type is not query: left, no, yes
    assert figures.pop("open") == 100.0
    # chi-square by group, weighted by size: g3 (two answers) fits: 0; g2 and g1 miss their one answer: (0-1)^2/1 = 1 each.
    # (0 * 2 + 1 * 1 + 1 * 1) / 4 = 0.5, divided by 100 and rounded; 201 has no group
    assert figures.pop("distribution") == 0.01
    assert figures == {
        "semantic/attr": 50.0,  # yes (wrong), t-shirt
        "semantic/cat": 100.0,
        "semantic/obj": 100.0,
        "semantic/rel": 0.0,
        "steps/01": 0.0,  # 200: neither `exist` nor `query: name` is a step
        "steps/02": 75.0,
        "structural/choose": 0.0,
        "structural/query": 100.0,
        "structural/verify": 50.0,
        "words/03": 0.0,
        "words/04": 100.0,
        "words/05": 0.0,
        "words/06": 100.0,
        "words/07": 100.0,
    }


def test_missing_answers_are_wrong_and_an_empty_one_is_unparsed(tmp_path: Path) -> None:
    items = GQA().load(gqa_folder(tmp_path))
    scores = GQA().score(items, said(items, None, "", None, "left", None, None))
    assert scores.aggregate["accuracy"] == 20.0
    assert scores.counts == {"scored": 2, "missing": 4, "unparsed": 1, "unbalanced": 1}
    assert GQA().score(items, {}).aggregate["accuracy"] == 0.0


def test_without_llavas_file_all_official_questions_are_asked(tmp_path: Path) -> None:
    (gqa_folder(tmp_path) / "llava_gqa_testdev_balanced.jsonl").unlink()
    items = GQA().load(tmp_path)
    assert [item.question_id for item in items] == [f"20{n}" for n in range(6)]
    assert items[0].prompt == "Is it ?" + SHORT


def test_a_question_that_the_annotations_lack_is_refused(tmp_path: Path) -> None:
    path = gqa_folder(tmp_path) / "data/testdev_balanced_questions.json"
    path.write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="question 205 is not in"):
        GQA().load(tmp_path)


def test_parquet_configs_are_joined_by_image(tmp_path: Path) -> None:
    records = json.loads((gqa_folder(tmp_path / "x") / "data/testdev_balanced_questions.json").read_text())
    rows = [{"id": name, **{k: v for k, v in r.items() if k != "annotations"}} for name, r in records.items()]
    images = [{"id": f"n{n}", "image": cell((n, 0, 0))} for n in (2, 1, 0)]
    write_parquet(tmp_path / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", rows)
    assert not GQA().load(tmp_path, "hf")[0].images[0].path.exists()  # scoring needs no images
    write_parquet(tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", images)
    items = GQA().load(tmp_path, "hf")
    assert open_image_ref(items[5].images[0]).getpixel((0, 0)) == (2, 0, 0)
    scores = GQA().score(items, said(items, *reversed(TEXTS)))
    assert scores.aggregate["accuracy"] == 60.0
    assert scores.aggregate["steps/01"] == 0.0
    write_parquet(tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", images[:2])
    with pytest.raises(DataError, match="no image n0 in testdev_balanced_images"):
        GQA().load(tmp_path, "hf")
