"""MMMU: TinyLLaVA's file, both parquet layouts, the official parsers and their traps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import by_id, cell, png, scored, write_image, write_json, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.mmmu import DOMAINS, MMMU, SUBJECTS, normalise, open_is_right, parse_open
from tinylmm.evaluation.images import open_image_ref

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
CHOICE = "validation_Accounting_1"
ART = "validation_Art_Theory_3"
OPEN = "validation_Math_2"
MANY = "validation_Music_9"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two choice questions, an open one with alternatives, and a choice question with several images."""
    folder = tmp_path / "MMMU"
    index2ans = {"A": "red", "B": "green", "C": "deep blue"}
    choice = {"question_type": "multiple-choice", "all_choices": ["A", "B", "C"], "index2ans": index2ans}
    write_json(
        folder / "anns_for_eval.json",
        [
            {"id": ART, "prompt": f"<image 1> Which?\n(A) red\n\n{LETTER}", "image": f"{ART}.png", **choice},
            {"id": CHOICE, "prompt": f"<image 1> What?\n(A) red\n\n{LETTER}", "image": f"{CHOICE}.png", **choice},
            {"id": OPEN, "prompt": f"How much?\n{WORD}", "image": f"{OPEN}.png", "question_type": "short-answer"},
            {"id": MANY, "prompt": "<image 1> <image 2> Which?", **choice},
        ],
    )
    gold = {"question_type": "multiple-choice"}
    write_json(
        folder / "eval/answer_dict_val.json",
        {
            CHOICE: gold | {"ground_truth": "B"},
            ART: gold | {"ground_truth": "C"},
            OPEN: {"question_type": "short-answer", "ground_truth": ["1,234.567", "twelve hundred"]},
            MANY: gold | {"ground_truth": "A"},
        },
    )
    write_image(folder / f"all_images/{ART}.png")
    return tmp_path


def test_items_keep_the_order_and_the_image_marks_of_the_file(root: Path) -> None:
    items = MMMU().load(root)
    assert [item.item_id for item in items] == [ART, CHOICE, OPEN, MANY]
    assert items[0].prompt == f"<image 1> Which?\n(A) red\n\n{LETTER}"
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    assert [len(item.images) for item in items] == [1, 1, 1, 0]
    assert [item.options for item in items] == [3, 3, 0, 3]
    assert [item.category for item in items] == ["Art_Theory", "Accounting", "Math", "Music"]
    assert MMMU().load(root / "MMMU") == items


def test_accuracy_is_a_micro_average_with_one_decimal(root: Path) -> None:
    items = MMMU().load(root)
    scores = scored(MMMU(), items, {ART: "(C)", CHOICE: "A", OPEN: "about 1234.57", MANY: "B"})
    assert scores.aggregate == {
        "overall": 50.0,
        "domain/Art and Design": 50.0,
        "domain/Business": 0.0,
        "domain/Science": 100.0,
        "subject/Art_Theory": 100.0,
        "subject/Accounting": 0.0,
        "subject/Math": 100.0,
        "subject/Music": 0.0,
    }
    assert scores.variant == "tinyllava"
    assert scored(MMMU(), items[:3], {ART: "C", CHOICE: "A", OPEN: "1"}).aggregate["overall"] == 33.3


def test_an_unread_choice_is_guessed_and_counted_and_a_missing_one_is_wrong(root: Path) -> None:
    items = MMMU().load(root)
    texts = {ART: "C. deep blue", CHOICE: "", OPEN: ""}
    first, second = scored(MMMU(), items, texts), scored(MMMU(), items, texts)
    assert first == second
    assert first.counts == {"scored": 3, "missing": 1, "unparsed": 2, "guessed": 2}
    assert by_id(first)[ART][1] is None and by_id(first)[CHOICE][1] is None
    assert by_id(first)[MANY] == (0.0, None)
    # the guess of one item does not depend on what was said of the others
    assert by_id(scored(MMMU(), items, {CHOICE: "", ART: "C"}))[CHOICE] == by_id(first)[CHOICE]


def test_the_official_scorer_guesses_in_the_order_of_subjects_and_skips_what_has_no_answer(root: Path) -> None:
    items = MMMU().load(root)
    scores = scored(MMMU(), items, {ART: "?", CHOICE: "?", OPEN: "twelve hundred"}, "official")
    draw = random.Random(42)
    accounting, art = draw.choice(["A", "B", "C"]), draw.choice(["A", "B", "C"])
    assert by_id(scores)[CHOICE][0] == float(accounting == "B")
    assert by_id(scores)[ART][0] == float(art == "C")
    assert by_id(scores)[MANY] == (None, None)
    expected = round(100 * ((accounting == "B") + (art == "C") + 1) / 3, 1)
    assert scores.aggregate["overall"] == expected
    assert scores.counts["missing"] == 1


def test_lmms_reads_letters_anywhere_and_once_failed_every_open_question(root: Path) -> None:
    items = MMMU().load(root)
    texts = {ART: "C. deep blue", CHOICE: "B) green", OPEN: "twelve hundred", MANY: "A"}
    assert by_id(scored(MMMU(), items, texts, "lmms"))[ART] == (1.0, "C")
    assert by_id(scored(MMMU(), items, texts, "lmms"))[OPEN][0] == 1.0
    assert by_id(scored(MMMU(), items, texts, "lmms_before_1471"))[OPEN][0] == 0.0


def test_what_an_open_answer_may_mean() -> None:
    assert parse_open("42") == [42.0]
    assert parse_open("B") == [" b", "b "]
    # the shortest tail after any indicator, of each line
    assert parse_open("The result is 5 apples") == ["5 apples", 5.0]
    assert parse_open("It could be so or so blue") == ["blue"]
    assert parse_open("so it is red\nfinal answer blue") == ["blue", "red"]
    # "=" counts on the last line only
    assert parse_open("x = 1\ny = 2") == [2.0]
    # a full stop in front is lost, one inside a number is not
    assert parse_open(".5") == [5.0]
    assert parse_open("It is 0.5.") == [0.5]
    # no indicator: the whole answer, with its numbers; the end of "1e3" and of "2,000" counts as one too
    assert parse_open("roughly 1e3 and 2,000") == ["roughly 1e3 and 2,000", 0.0, 3.0, 1000.0, 2000.0]
    # ". A" would split sentences, but everything is lower case by then
    assert parse_open("No. It was") == ["no. it was"]
    assert parse_open("") == [""]


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("i do not know", ["no"], True),  # a text is searched inside the answer
        ("no", ["not at all"], False),
        ("3.141", ["3.1415"], True),  # both rounded to two decimals
        ("3.15", ["3.1415"], False),
        ("1,000", ["1000"], True),
        ("a", ["a"], True),  # " a" and "a " on both sides
        ("banana", ["a"], False),  # a single letter needs its space
        ("the a", ["a"], True),
        ("12", ["3", "12"], True),  # any alternative
    ],
)
def test_right_means_contained_text_or_equal_number(said: str, gold: list[str], right: bool) -> None:
    assert open_is_right(parse_open(said), gold) is right


def test_what_the_parser_takes_for_infinite_is_still_json(root: Path) -> None:
    items = MMMU().load(root)
    scores = scored(MMMU(), items, {OPEN: "Infinity"})
    assert json.loads(json.dumps(scores.as_json(items), allow_nan=False))["per_item"][2]["parsed"] == ["inf"]


def test_numbers_lose_commas_and_texts_case() -> None:
    assert normalise(" 1,234.567 ") == [1234.57]
    assert normalise("X") == [" x", "x "]
    assert normalise("Deep Blue") == ["deep blue"]


def row(item_id: str, **more: Any) -> dict[str, Any]:
    base = {
        "id": item_id,
        "question": "<image 1> Which?",
        "options": "['red', \"it's green\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": cell(png()),
        "image_2": None,
    }
    return base | more


def test_parquet_options_and_answers_are_strings_of_lists(tmp_path: Path) -> None:
    rows = [row(CHOICE), row(OPEN, options="[]", answer="['7', 'seven']", question_type="open")]
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows)
    items = MMMU().load(tmp_path, "hf")
    assert items[0].prompt == f"<image 1> Which?\n(A) red\n(B) it's green\n\n{LETTER}"
    assert items[1].prompt == f"<image 1> Which?\n{WORD}"
    assert open_image_ref(items[0].images[0]).size == (4, 3) and len(items[0].images) == 1
    scores = scored(MMMU(), items, {CHOICE: "B", OPEN: "It is seven"})
    assert scores.aggregate["overall"] == 100.0
    # an open answer that is no list is one answer, also where it looks like a number
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [row(OPEN, answer="7", question_type="open")])
    assert MMMU().load(tmp_path, "hf")[0].reference["gold"] == ["7"]


def test_parquet_of_one_folder_a_subject_is_read_in_the_order_of_subjects(tmp_path: Path) -> None:
    write_parquet(tmp_path / "Math/validation-00000-of-00001.parquet", [row(OPEN)])
    write_parquet(tmp_path / "Accounting/validation-00000-of-00001.parquet", [row(CHOICE)])
    assert [item.item_id for item in MMMU().load(tmp_path, "hf")] == [CHOICE, OPEN]


def test_a_string_that_is_no_list_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [row(CHOICE, options="red, green")])
    with pytest.raises(DataError, match=r"validation-00000.*row 0: 'red, green' is no list"):
        MMMU().load(tmp_path, "hf")


def test_the_upload_is_letters_and_texts_by_id(root: Path, tmp_path: Path) -> None:
    items = MMMU().load(root)
    answers = MMMU().pair(items, [{"question_id": CHOICE, "text": "(B)"}, {"question_id": OPEN, "text": "about 5"}])
    MMMU().write_submission(items, answers, tmp_path / "upload.json")
    assert json.loads((tmp_path / "upload.json").read_text()) == {CHOICE: "B", OPEN: "about 5"}


def test_there_are_thirty_subjects_in_six_domains() -> None:
    assert len(DOMAINS) == 6 and len(SUBJECTS) == len(set(SUBJECTS)) == 30


def test_gold_of_another_split_is_refused(root: Path) -> None:
    write_json(root / "MMMU/eval/answer_dict_val.json", {})
    with pytest.raises(DataError, match=r"record 1: .*answer_dict_val.json has no answer for validation_Art_Theory_3"):
        MMMU().load(root)
