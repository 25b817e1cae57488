"""MME: sums over tasks, pairs of questions. Cases worked out by hand from MME's calculation.py and LLaVA's converter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    SHORT,
    answer_rows,
    cell,
    mme_folder,
    said,
    values,
    write_parquet,
)
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.mme import COGNITION, MME, PERCEPTION, lmms_answer, official_answer


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("No, it is not.", "no", "no"),
        ("know", "no", "no"),
        ("nose", "no", "no"),
        ("not", "no", "no"),
        ("snow", "no", "no"),
        ("eyes", "yes", "yes"),
        (" yes", "yes", "yes"),
        ("  yes", None, "yes"),  # four characters are "  ye"; lmms strips
        ("y", None, "yes"),
        ("N.", None, "no"),
        ("The answer is yes", None, None),
        ("", None, None),
        ("yes\tno\nmaybe", "yes", "yes"),  # would break the tool's tables
    ],
)
def test_what_is_read_out_of_an_answer(text: str, official: str | None, lmms: str | None) -> None:
    assert official_answer(text) == official
    assert lmms_answer(text) == lmms


def test_answers_are_found_by_image_and_question(tmp_path: Path) -> None:
    items = MME().load(mme_folder(tmp_path / "MME").parent)
    assert [item.question_id for item in items[:2]] == ["existence/images/a.jpg"] * 2
    assert [item.item_id for item in items[:2]] == ["existence/images/a.jpg", "existence/images/a.jpg#2"]
    assert [item.reference for item in items] == ["yes", "no"] * 3
    assert [item.category for item in items] == ["existence"] * 4 + ["code_reasoning"] * 2
    assert items[1].prompt == "Is it not?" + SHORT


def test_a_task_is_accuracy_plus_accuracy_of_pairs_and_totals_are_sums(tmp_path: Path) -> None:
    items = MME().load(mme_folder(tmp_path))
    scores = MME().score(items, said(items, "Yes", "No", "Yes", "Yes", "no", "no"))
    assert values(scores) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert scores.aggregate == {
        "perception": 125.0,
        "cognition": 50.0,
        "existence/acc": 75.0,
        "existence/acc+": 50.0,
        "existence/score": 125.0,
        "code_reasoning/acc": 50.0,
        "code_reasoning/acc+": 0.0,
        "code_reasoning/score": 50.0,
    }


def test_totals_reach_2000_and_800() -> None:
    assert len(PERCEPTION) * 200 == 2000
    assert len(COGNITION) * 200 == 800


def test_other_answers_and_missing_ones_are_wrong(tmp_path: Path) -> None:
    items = MME().load(mme_folder(tmp_path))
    answers = said(items, "The answer is yes", None, "Yes", "No", "", "y")
    scores = MME().score(items, answers)
    assert values(scores) == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert scores.counts == {"scored": 5, "missing": 1, "unparsed": 3}
    assert MME().score(items, {}).aggregate["perception"] == 0.0
    assert values(MME().score(items, said(items, "Yes.", "n", *[None] * 4), "lmms"))[:2] == [1.0, 1.0]


def test_answers_of_one_image_are_told_apart_by_their_prompt(tmp_path: Path) -> None:
    items = MME().load(mme_folder(tmp_path))
    rows = answer_rows(items, ["Yes", "No"] * 3)[::-1]
    assert MME().score(items, MME().pair(items, rows)).aggregate["perception"] == 200.0
    rows = [{key: row[key] for key in ("question_id", "text")} for row in answer_rows(items, ["Yes", "No"] * 3)]
    with pytest.raises(DataError, match=r"answer 1, .*: 2 questions share this id, so the answer needs the `prompt`"):
        MME().pair(items, rows)


def test_a_question_that_the_release_lacks_is_refused(tmp_path: Path) -> None:
    path = mme_folder(tmp_path) / "MME_Benchmark_release_version/code_reasoning/0020.txt"
    path.write_text("Is it? Please answer yes or no.\tYes\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"code_reasoning/0020\.png#2: the release has no answer to 'Is it not\?'"):
        MME().load(tmp_path)
    path.write_text("Is it? Yes\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"0020\.txt: the line .* is no question, tab and answer"):
        MME().load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"0020\.txt not found"):
        MME().load(tmp_path)


def test_parquet_columns_score_alike(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": "OCR/1.png",
            "question": f"{q} Please answer yes or no.",
            "answer": a,
            "category": "OCR",
            "image": cell((9, 9, 9)),
        }
        for q, a in (("Is it?", "Yes"), ("Is it not?", "No"))
    ]
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    items = MME().load(tmp_path, "hf")
    assert items[1].prompt == "Is it not?" + SHORT
    for variant in MME.variants:
        assert MME().score(items, said(items, "Yes", "No"), variant).aggregate["perception"] == 200.0
