"""Free-text normalisation and soft accuracy; expectations worked out by hand from VQA's vqaEval.py and mmf's m4c code."""

from __future__ import annotations

import pytest

from tinylmm.evaluation.benchmarks.free_text import always_rule, m4c_rule, official_rule, uploaded_rule
from tinylmm.evaluation.benchmarks.vqa_text import CONTRACTIONS, PUNCTUATION, m4c_text, official_text, soft_accuracy


@pytest.mark.parametrize(
    ("text", "official"),
    [
        ("Yes", "yes"),
        ("the  Cat and a dog", "cat and dog"),
        ("a", ""),
        ("A.", ""),
        ("two", "2"),
        ("ten", "10"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("2.", "2"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("p.m.", "pm"),
        (".5", ".5"),
        ("red\nblue\tgreen ", "red blue green"),
        ("red/blue", "red blue"),  # no space beside it: replaced by one
        ("red /blue", "red blue"),  # a space beside it: deleted
        ("red/blue /green", "redblue green"),  # ... everywhere
        ("1,000", "1000"),
        ("1,000 red-blue", "1000 redblue"),  # digit, comma, digit anywhere: all punctuation is deleted
        ("lime,mint", "lime mint"),
        ("women's", "women's"),
        ("it's 5:00 & $4 #1 50% *", "it's 5:00 & $4 #1 50% *"),
        ("“yes”", "“yes”"),
        ("what?!", "what"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("Im", "im"),  # its key is upper case, so it can never match
        ("Ive", "ive"),
        ("Id've", "id've"),
        ("I'dve", "i'dve"),
        ("somebody'd", "somebodyd"),  # the table has it the wrong way round
        ("ow's'at", "'ow's'at"),
        ("", ""),
    ],
)
def test_the_official_normalisation(text: str, official: str) -> None:
    assert official_text(text) == official


@pytest.mark.parametrize(
    ("text", "m4c"),
    [
        ("women's", "women 's"),
        ("lime,mint", "limemint"),
        ("1,000", "1000"),
        ("1,000 red-blue", "1000 red blue"),  # the comma is gone before it can change how the rest is treated
        ("what?", "what"),
        ("The Answer is two.", "answer is 2"),
        ("let's", "let 's"),
        ("a", ""),
    ],
)
def test_m4c_tokenizes_first(text: str, m4c: str) -> None:
    assert m4c_text(text) == m4c


def test_at_most_32_periods_go() -> None:
    # re.UNICODE, which is 32, is handed over where the count belongs
    assert official_text("." * 33) == "."
    assert official_text("." * 32) == ""


def test_the_tables_are_complete() -> None:
    assert len(CONTRACTIONS) == 120
    assert "".join(PUNCTUATION) == ';/[]"{}()=+\\_-><@`,?!'
    assert CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["let's"] == "let's"


@pytest.mark.parametrize(
    ("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_soft_accuracy_leaves_each_annotator_out(matching: int, accuracy: float) -> None:
    # 3 of 10: each of the 3 sees 2 others (2/3), each of the 7 sees 3 (1): (3 * 2/3 + 7) / 10 = 0.9, not 1
    assert soft_accuracy("a", ["a"] * matching + ["b"] * (10 - matching)) == pytest.approx(accuracy)


def test_no_references_score_nothing() -> None:
    assert soft_accuracy("a", []) == 0.0


class TestRules:
    def test_the_official_rule_normalises_nothing_where_all_ten_agree(self) -> None:
        assert official_rule("Yes", ["yes"] * 10) == ("Yes", 0.0)
        assert official_rule(" yes\n", ["yes "] * 10) == ("yes", 1.0)  # but strips, also to find that all agree
        assert official_rule("Yes", ["yes"] * 9 + ["no"]) == ("yes", 1.0)

    def test_an_upload_by_llava_makes_that_harmless(self) -> None:
        assert uploaded_rule("Yes.", ["yes"] * 10) == ("yes", 1.0)

    def test_lmms_always_normalises_vqav2(self) -> None:
        assert always_rule("Yes", ["yes"] * 10) == ("yes", 1.0)

    def test_m4c_loses_a_possessive_against_the_official_references(self) -> None:
        mixed = ["women's"] * 9 + ["men's"]
        assert official_rule("women's", mixed)[1] == 1.0
        assert uploaded_rule("women's", mixed) == ("women 's", 0.0)
        assert m4c_rule("women's", mixed)[1] == 1.0

    def test_an_empty_answer_equals_the_reference_a(self) -> None:
        assert official_rule("", ["a"] * 5 + ["b"] * 5) == ("", 1.0)
