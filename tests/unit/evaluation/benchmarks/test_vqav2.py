"""VQAv2: val by the official rule, test-dev as an upload. Cases worked out by hand from vqaEval.py and LLaVA's converter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    SHORT,
    cell,
    parsed,
    said,
    values,
    vqav2_folder,
    write_json,
    write_jsonl,
    write_parquet,
)
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.vqav2 import VQAv2
from tinylmm.evaluation.images import open_image_ref

TEN_YES = ["yes"] * 10
MIXED = ["two"] * 3 + ["3"] * 7
WOMEN = ["women's"] * 9 + ["men's"]


def folder_of_testdev(folder: Path) -> Path:
    """Two of four test2015 questions are test-dev's."""
    write_jsonl(
        folder / "llava_vqav2_mscoco_test-dev2015.jsonl",
        [{"question_id": n, "image": f"{n}.jpg", "text": "Q?" + SHORT, "category": "default"} for n in (262, 263)],
    )
    write_jsonl(
        folder / "llava_vqav2_mscoco_test2015.jsonl",
        [{"question_id": n, "image": f"{n}.jpg", "text": "Q?" + SHORT} for n in (263, 1, 262, 2)],
    )
    return folder


class TestVal:
    def test_items_carry_prompt_image_and_types(self, tmp_path: Path) -> None:
        items = VQAv2().load(vqav2_folder(tmp_path / "vqav2", [TEN_YES, MIXED]).parent)
        assert [item.question_id for item in items] == [1001, 1002]
        assert items[0].prompt == "What is 0?" + SHORT
        assert items[0].images[0].path == tmp_path / "vqav2/val2014/COCO_val2014_000000000042.jpg"
        assert [item.category for item in items] == ["yes/no", "number"]

    def test_the_official_rule_with_its_exception_is_the_default(self, tmp_path: Path) -> None:
        items = VQAv2().load(vqav2_folder(tmp_path, [TEN_YES, MIXED, WOMEN]))
        scores = VQAv2().score(items, said(items, "Yes", "2", "women's"))
        assert scores.variant == "official"
        assert values(scores) == [0.0, 0.9, 1.0]
        assert parsed(scores) == ["Yes", "2", "women's"]
        assert scores.aggregate == {
            "accuracy": 63.33,
            "answer_type/number": 90.0,
            "answer_type/other": 100.0,
            "answer_type/yes/no": 0.0,
            "question_type/how many": 50.0,
            "question_type/what is": 90.0,
        }
        assert scores.counts == {"scored": 3, "missing": 0, "unparsed": 0}

    @pytest.mark.parametrize(("variant", "expected"), [("llava", [1.0, 0.9, 0.0]), ("lmms", [1.0, 0.9, 1.0])])
    def test_variants_differ_where_references_agree_and_in_possessives(
        self, tmp_path: Path, variant: str, expected: list[float]
    ) -> None:
        items = VQAv2().load(vqav2_folder(tmp_path, [TEN_YES, MIXED, WOMEN]))
        assert values(VQAv2().score(items, said(items, "Yes", "2", "women's"), variant)) == expected

    def test_missing_and_empty_answers_are_wrong_and_counted(self, tmp_path: Path) -> None:
        items = VQAv2().load(vqav2_folder(tmp_path, [TEN_YES, MIXED]))
        scores = VQAv2().score(items, said(items, None, " "))
        assert values(scores) == [0.0, 0.0]
        assert scores.counts == {"scored": 1, "missing": 1, "unparsed": 1}
        assert VQAv2().score(items, {}).aggregate["accuracy"] == 0.0

    def test_a_question_without_annotation_is_refused(self, tmp_path: Path) -> None:
        vqav2_folder(tmp_path, [TEN_YES])
        write_json(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
        with pytest.raises(
            DataError, match=r"question 1001 of val: v2_mscoco_val2014_annotations\.json has no answers"
        ):
            VQAv2().load(tmp_path)

    def test_a_missing_annotation_file_is_named(self, tmp_path: Path) -> None:
        vqav2_folder(tmp_path, [TEN_YES])
        (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
        with pytest.raises(DataError, match=r"annotations\.json not found; looked for .*visualqa\.org"):
            VQAv2().load(tmp_path)

    def test_an_unknown_variant_lists_those_there_are(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'offical' is unknown\. Did you mean 'official'\? vqav2 has official, llava"
        ):
            VQAv2().score([], {}, "offical")

    def test_no_items_at_all_score_without_a_crash(self) -> None:
        assert VQAv2().score([], {}).counts == {"scored": 0, "missing": 0, "unparsed": 0}


class TestUpload:
    def test_testdev_has_no_metric_but_an_upload_over_all_test_questions(self, tmp_path: Path) -> None:
        items = VQAv2().load(folder_of_testdev(tmp_path))
        answers = said(items, "Women's, two.", None)
        scores = VQAv2().score(items, answers)
        assert scores.aggregate == {}
        assert scores.counts == {"scored": 0, "missing": 1, "unparsed": 0, "hidden": 2}
        assert values(scores) == [None, None]
        VQAv2().write_submission(items, answers, tmp_path / "upload.json")
        assert json.loads((tmp_path / "upload.json").read_text()) == [
            {"question_id": 263, "answer": ""},
            {"question_id": 1, "answer": ""},
            {"question_id": 262, "answer": "women 's 2"},
            {"question_id": 2, "answer": ""},
        ]

    def test_an_upload_needs_the_full_list(self, tmp_path: Path) -> None:
        (folder_of_testdev(tmp_path) / "llava_vqav2_mscoco_test2015.jsonl").unlink()
        items = VQAv2().load(tmp_path)
        with pytest.raises(DataError, match=r"llava_vqav2_mscoco_test2015\.jsonl .*not found: the upload covers all"):
            VQAv2().write_submission(items, {}, tmp_path / "upload.json")

    def test_val_has_no_upload(self, tmp_path: Path) -> None:
        items = VQAv2().load(vqav2_folder(tmp_path, [TEN_YES]))
        with pytest.raises(ConfigError, match="val is scored locally"):
            VQAv2().write_submission(items, {}, tmp_path / "upload.json")

    def test_where_both_lie_val_is_taken_unless_a_split_is_named(self, tmp_path: Path) -> None:
        vqav2_folder(folder_of_testdev(tmp_path), [TEN_YES])
        assert [item.question_id for item in VQAv2().load(tmp_path)] == [1001]
        assert [item.question_id for item in VQAv2("test-dev").load(tmp_path)] == [262, 263]
        assert len(VQAv2("test").load(tmp_path)) == 4


def test_parquet_columns_score_alike(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": 7 + n,
            "image_id": 1,
            "question": "Q?",
            "question_type": "none of the above",
            "answer_type": "other",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given)],
            "image": cell((n, 0, 0)),
        }
        for n, given in enumerate([TEN_YES, MIXED])
    ]
    write_parquet(tmp_path / "data/validation-00000-of-00002.parquet", rows[:1])
    write_parquet(tmp_path / "data/validation-00001-of-00002.parquet", rows[1:])
    items = VQAv2().load(tmp_path, "hf")
    assert items[1].prompt == "Q?" + SHORT
    assert open_image_ref(items[1].images[0]).getpixel((0, 0)) == (1, 0, 0)
    assert values(VQAv2().score(items, said(items, "yes", "two"))) == [1.0, 0.9]
