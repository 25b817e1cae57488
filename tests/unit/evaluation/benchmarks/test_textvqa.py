"""TextVQA: joined by image and question, with OCR tokens and without. Cases by hand from LLaVA's eval_textvqa.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    SHORT,
    answer_rows,
    cell,
    said,
    textvqa_folder,
    values,
    write_json,
    write_parquet,
)
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.textvqa import TextVQA, question_of


def test_annotations_are_found_by_image_and_question(tmp_path: Path) -> None:
    items = TextVQA().load(textvqa_folder(tmp_path / "textvqa").parent)
    assert [item.question_id for item in items] == ["aa", "bb", "aa", "cc"]
    assert [item.item_id for item in items] == ["aa", "bb", "aa#2", "cc"]
    assert items[0].prompt == "What is it?\nReference OCR token: x, y" + SHORT
    assert items[0].images[0].path.name == "aa.jpg"
    scores = TextVQA().score(items, said(items, "Nokia.", "Bob", "Women's", "3.5"))
    assert values(scores) == [1.0, 0.9, 1.0, 0.6]
    assert scores.aggregate == {"accuracy": 87.5}
    assert [row["id"] for row in scores.as_json(items)["per_item"]] == ["aa", "bb", "aa", "cc"]


def test_answers_are_joined_by_the_question_in_their_prompt_not_by_position(tmp_path: Path) -> None:
    items = TextVQA().load(textvqa_folder(tmp_path))
    rows = answer_rows(items, ["nokia", "bob", "women's", "3.5"])[::-1]
    assert values(TextVQA().score(items, TextVQA().pair(items, rows))) == [1.0, 0.9, 1.0, 0.6]


def test_answers_may_carry_textvqas_own_question_ids(tmp_path: Path) -> None:
    folder = textvqa_folder(tmp_path)
    path = folder / "TextVQA_0.5.1_val.json"
    records = json.loads(path.read_text())["data"]
    write_json(path, {"data": [record | {"question_id": 34602 + n} for n, record in enumerate(records)]})
    items = TextVQA().load(tmp_path)
    own = {name: item for item in items for name in item.other_ids}
    assert len(own) == len(items)
    right = dict(zip([item.item_id for item in items], ["nokia", "bob", "women's", "3.5"], strict=True))
    rows = [{"question_id": int(name), "text": right[own[name].item_id]} for name in sorted(own, reverse=True)]
    assert values(TextVQA().score(items, TextVQA().pair(items, rows))) == [1.0, 0.9, 1.0, 0.6]


def test_all_variants_normalise_by_m4c_on_both_sides(tmp_path: Path) -> None:
    items = TextVQA().load(textvqa_folder(tmp_path))
    for variant in TextVQA.variants:
        assert values(TextVQA().score(items, said(items, "NOKIA,", None, "", "4"), variant)) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "prompt",
    [
        "What is It?\nReference OCR token: a, b" + SHORT,
        "Reference OCR token: a, b\nWhat is It?" + SHORT,
        "Reference OCR token: \nWhat is It?" + SHORT,
        "What is It?" + SHORT,
        "<image>\nWhat is It?" + SHORT,
        "OCR tokens: a, b. Question: What is It? Short answer:",
    ],
)
def test_the_question_is_cut_out_of_every_known_prompt(prompt: str) -> None:
    assert question_of(prompt) == "what is it?"


def test_a_prompt_of_another_shape_is_refused(tmp_path: Path) -> None:
    items = TextVQA().load(textvqa_folder(tmp_path))
    row = {"question_id": "bb", "prompt": "a\nb\nc\nd", "text": "bob"}
    with pytest.raises(DataError, match="answer 1, question_id 'bb': none of its 1 questions is the one in the prompt"):
        TextVQA().pair(items, [row])


def test_tokens_can_be_left_out(tmp_path: Path) -> None:
    items = TextVQA(ocr=False).load(textvqa_folder(tmp_path))
    assert [item.prompt for item in items[:2]] == ["What is it?" + SHORT, "Who?" + SHORT]
    rows = answer_rows(items, ["nokia", "bob", "women's", "3.5"])
    assert len(TextVQA(ocr=False).pair(items, rows)) == 4


def test_ten_references_are_required(tmp_path: Path) -> None:
    textvqa_folder(tmp_path)
    record = {"image_id": "aa", "question": "what is it?", "answers": ["a"] * 9}
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [record]})
    with pytest.raises(DataError, match=r"record 1: 9 answers where TextVQA val has 10"):
        TextVQA().load(tmp_path)


def test_an_unannotated_question_is_refused(tmp_path: Path) -> None:
    textvqa_folder(tmp_path)
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": []})
    with pytest.raises(DataError, match="has no question 'what is it\\?' about this image"):
        TextVQA().load(tmp_path)


def test_parquet_columns_make_the_same_prompts(tmp_path: Path) -> None:
    row = {
        "image_id": "aa",
        "question_id": 34602,
        "question": "what IS it?",
        "answers": ["nokia"] * 10,
        "ocr_tokens": ["x", "y"],
        "image": cell((1, 2, 3)),
    }
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [row])
    item = TextVQA().load(tmp_path, "hf")[0]
    assert (item.question_id, item.prompt) == (34602, "What is it?\nReference OCR token: x, y" + SHORT)
    assert TextVQA(ocr=False).load(tmp_path, "hf")[0].prompt == "What is it?" + SHORT
    assert TextVQA().score([item], said([item], "nokia")).aggregate == {"accuracy": 100.0}
