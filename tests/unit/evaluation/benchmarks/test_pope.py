"""POPE: parsing, figures, labels by content. Cases worked out by hand from POPE's evaluate.py and LLaVA's eval_pope.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    SHORT,
    cell,
    parsed,
    pope_folder,
    said,
    values,
    write_jsonl,
    write_parquet,
)
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.pope import POPE, lmms_answer, official_answer
from tinylmm.evaluation.images import open_image_ref


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no", "no", "no"),
        ("There is not a dog", "no", None),
        ("No, there is none.", "no", None),
        ("Yes. No", "yes", None),  # the first sentence counts
        ("NO", "yes", "no"),
        ("Nope", "yes", None),
        ("isn't", "yes", None),
        ("", "yes", None),
        ("No\n", "yes", "no"),
        ("No!", "yes", None),
        (".No", "yes", None),
        ("Yes.", "yes", None),
        ("No.", "no", None),
        (" no ", "no", "no"),
    ],
)
def test_what_is_read_out_of_an_answer(text: str, official: str, lmms: str | None) -> None:
    assert official_answer(text) == official
    assert lmms_answer(text) == lmms


def test_labels_are_paired_by_content_not_by_order(tmp_path: Path) -> None:
    items = POPE().load(pope_folder(tmp_path / "pope").parent)
    assert [item.question_id for item in items] == [1, 2, 20000001, 20000002, 10000001, 10000002, 10000003]
    assert [item.reference for item in items] == ["yes", "no", "yes", "no", "yes", "no", "yes"]
    assert items[0].prompt == "Is there a adversarial?" + SHORT


def test_f1_and_accuracy_are_means_over_categories(tmp_path: Path) -> None:
    items = POPE().load(pope_folder(tmp_path))
    # adversarial: both right. popular: yes, yes (one false yes). random: yes, no, no (one missed yes)
    answers = said(items, "Yes", "No", "Yes", "Yes", "Yes", "No", "No")
    for variant in ("llava", "official"):
        scores = POPE().score(items, answers, variant)
        assert values(scores) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
        figures = scores.aggregate
        assert next(iter(figures)) == "f1"
        # popular: precision 1/2, recall 1, F1 2/3; random: precision 1, recall 1/2, F1 2/3
        assert figures["f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)
        assert figures["accuracy"] == pytest.approx(100 * (1 + 1 / 2 + 2 / 3) / 3)
        assert figures["popular/precision"] == 50.0
        assert figures["random/recall"] == 50.0
        assert figures["popular/yes_ratio"] == 100.0
        assert figures["random/yes_ratio"] == pytest.approx(100 / 3)
        assert figures["adversarial/f1"] == 100.0


def test_lmms_pools_items_and_counts_labels_as_its_yes_ratio(tmp_path: Path) -> None:
    items = POPE().load(pope_folder(tmp_path))
    # "Yes." is neither yes nor no: wrong, and left out of the recall
    scores = POPE().score(items, said(items, "Yes.", "No", "yes", "YES", "Yes", "no", "no"), "lmms")
    assert values(scores) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert scores.counts["unparsed"] == 1
    figures = scores.aggregate
    assert figures["accuracy"] == pytest.approx(100 * 4 / 7)
    assert figures["precision"] == pytest.approx(100 * 2 / 3)  # two true yes, one false
    assert figures["recall"] == pytest.approx(100 * 2 / 3)  # two true yes, one missed: "Yes." takes no part
    assert figures["f1"] == pytest.approx(100 * 2 / 3)
    assert figures["yes_ratio"] == pytest.approx(100 * 4 / 7)  # four labels are yes


@pytest.mark.parametrize("text", ["No", "Yes", "", None])
@pytest.mark.parametrize("variant", POPE.variants)
def test_all_equal_empty_or_missing_answers_divide_by_nothing(tmp_path: Path, text: str | None, variant: str) -> None:
    items = POPE().load(pope_folder(tmp_path))
    scores = POPE().score(items, said(items, *[text] * 7), variant)
    if text == "No":
        assert scores.aggregate["f1"] == 0.0
        assert scores.aggregate["adversarial/accuracy"] == 50.0
    if text == "" and variant != "lmms":  # an empty answer is a yes
        assert parsed(scores) == ["yes"] * 7
    if text is None:
        assert scores.counts == {"scored": 0, "missing": 7, "unparsed": 0}
        assert scores.aggregate["accuracy"] == 0.0


def test_a_missing_answer_misses_its_object(tmp_path: Path) -> None:
    items = POPE().load(pope_folder(tmp_path, {"random": ("yes", "yes", "no")}))
    figures = POPE().score(items, said(items, "Yes", None, None)).aggregate
    assert (figures["recall"], figures["precision"]) == (50.0, 100.0)
    assert figures["accuracy"] == pytest.approx(100 / 3)


def test_labels_of_another_version_are_refused(tmp_path: Path) -> None:
    pope_folder(tmp_path)
    rows = [{"question_id": 1, "image": "COCO_val2014_000000000000.jpg", "text": "Is there a cat?", "label": "yes"}]
    write_jsonl(tmp_path / "coco/coco_pope_random.json", rows * 3)
    with pytest.raises(DataError, match=r"question 10000001: coco_pope_random.json has no label .* commit e3e39262"):
        POPE().load(tmp_path)


def test_a_typo_that_a_later_version_mended_is_a_mismatch(tmp_path: Path) -> None:
    path = pope_folder(tmp_path) / "llava_pope_test.jsonl"
    path.write_text(
        path.read_text().replace("Is there a popular?", "Is there a popular in the imange?"), encoding="utf-8"
    )
    with pytest.raises(
        DataError, match=r"coco_pope_popular\.json has no label for 'Is there a popular in the imange\?'"
    ):
        POPE().load(tmp_path)


def test_a_question_with_both_labels_is_refused(tmp_path: Path) -> None:
    pope_folder(tmp_path, {"random": ("yes",)})
    rows = [
        {"image": "COCO_val2014_000000000000.jpg", "text": "Is there a random?", "label": label}
        for label in ("yes", "no")
    ]
    write_jsonl(tmp_path / "coco/coco_pope_random.json", rows)
    with pytest.raises(DataError, match=r"line 2: .* has both labels"):
        POPE().load(tmp_path)


def test_a_missing_label_file_says_which_commit_has_it(tmp_path: Path) -> None:
    (pope_folder(tmp_path) / "coco/coco_pope_popular.json").unlink()
    with pytest.raises(DataError, match=r"coco_pope_popular\.json not found; looked for .* e3e39262"):
        POPE().load(tmp_path)


@pytest.mark.parametrize("full", [False, True])
def test_parquet_ids_that_start_anew_are_told_apart(tmp_path: Path, full: bool) -> None:
    rows = [
        {
            "id": str(n),
            "question_id": "1",
            "question": "Is it? ",
            "answer": "yes",
            "category": c,
            "image": cell((n, 0, 0)),
        }
        for n, c in enumerate(("random", "popular", "adversarial"))
    ]
    if full:
        for row in rows:
            write_parquet(tmp_path / f"Full/{row['category']}-00000-of-00001.parquet", [row])
    else:
        write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    items = POPE().load(tmp_path, "hf")
    assert [item.question_id for item in items] == ["0", "1", "2"]
    assert items[2].prompt == "Is it?" + SHORT
    assert open_image_ref(items[2].images[0]).getpixel((0, 0)) == (2, 0, 0)
    assert POPE().score(items, said(items, "Yes", "yes", "No")).aggregate["accuracy"] == pytest.approx(200 / 3)
