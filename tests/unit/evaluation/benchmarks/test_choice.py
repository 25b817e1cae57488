"""The parsing rules that multiple-choice benchmarks share, each case by hand."""

from __future__ import annotations

import pytest

from tinylmm.evaluation.benchmarks.choice import (
    extract_lmms,
    guess,
    infer_opencompass,
    infer_vlmeval,
    lettered,
    listing,
    parse_leading,
    parse_listed,
)

ANIMALS = lettered(["cat", "dog", "blue whale", "horse"])


@pytest.mark.parametrize(
    ("text", "official", "loose"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("B.", "B", "B"),
        ("'B'", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("(A) or rather (C)", "C", "C"),  # the last one wins
        ("A is wrong, so B", "B", "B"),
        ("(A) is better than B or C", "A", "A"),  # brackets win over bare letters, wherever they are
        ("A. cat", None, "A"),  # the official parser guesses here, lmms-eval does not
        ("B)", None, None),
        ("b", None, None),
        ("**B**", None, None),
        ("E", None, None),  # not on offer
        ("", None, None),
        ("In my opinion it is a blue whale", "C", "C"),
        ("it is a blue whale", None, None),  # five words: option texts count from six on
        ("I saw a DOG and then a big horse", "D", "D"),  # of several texts the one that ends up last
        ("The DNA of this one", None, "A"),  # loose: a letter at the end of a word
        ("B.,", "B", "B"),  # the comma goes first, then the full stop
        ("B,.", None, None),  # each mark is stripped once, in order: ", ." leaves the comma behind
    ],
)
def test_mmmu_parser_in_the_official_and_the_lmms_reading(text: str, official: str | None, loose: str | None) -> None:
    assert parse_listed(text, ANIMALS) == official
    assert parse_listed(text, ANIMALS, loose=True) == loose


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B. dog\n", "B"),
        ("(C)", "C"),
        ("Best option: (A)", "B"),  # the first character is a letter on offer
        ("Answer: D", "A"),
        ("The one is (D)", "D"),
        ("", None),
        (" .!", None),
        ("no idea", None),
    ],
)
def test_tinyllava_video_reads_the_first_character_before_anything_else(text: str, letter: str | None) -> None:
    assert parse_leading(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("The answer is (B).", "B"),
        ("B. dog", "B"),
        ("A or B", None),  # two letters
        ("B and again B", "B"),  # one distinct letter, twice
        ("b", None),
        ("I think C is what the picture shows us", None),  # not among the last four words, and no text
        ("one two three B five six seven", "B"),  # fourth from the end
        ("one two three B five six seven eight", None),  # fifth from the end, and no option's words
        ("The correct answer is **C** because whales live in the water", "C"),
        ("it is a dog", "B"),
        ("The correct answer is C because it has a wide door for the hay", "C"),  # asterisks are optional
        ("answer  is ***d*** as I see it in the picture above", "D"),  # of either case
        ("The answer is blue", "B"),  # also the beginning of a word
        ("The answer is a horse, that much is certain", "A"),
        ("The correct answer is E, as far as can be seen", None),  # A to D only
        ("no option fits: Z", "Z"),
        ("Z or B", "B"),
        ("Cannot determine the answer. B", "Z"),  # a refusal is read, and wrong
        ("Sorry, I can't help with images of people yet.", "Z"),
        ("Failed to obtain answer via API B", None),  # no reply, and too few words for a text
        ("Failed to obtain answer via API: dog", "B"),
        ("a dog or a horse", None),
        ("a dog " + "and grass " * 9, None),  # longer than twice all options together
        ("", None),
    ],
)
def test_vlmeval_rules(text: str, letter: str | None) -> None:
    assert infer_vlmeval(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),  # also where there is no such option
        ("B.", "B"),
        ("B,", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        ("answer :B", "B"),
        ("A dog is here", "B"),  # four words with "A": an article, and then the text decides
        ("A dog here", "A"),  # three words: the letter
        ("A cat and C are here", "A"),  # two letters: the text decides again
        ("C is the one with A tail", None),
        ("A blue whale is what C. shows", "C"),  # the spellings with punctuation still count
        ("b", None),
        ("it is a dog", "B"),
        ("Failed to obtain answer via API B", None),
    ],
)
def test_first_opencompass_rules(text: str, letter: str | None) -> None:
    assert infer_opencompass(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B, since it barks at D", "B"),  # what it begins with goes before what it ends with
        ("it barks, so B!", "B"),
        ("Bark D", "D"),  # a letter at the beginning of a word is none
        ("The answer is B, as A is red", "A"),  # of the letters after a phrase the last
        ("my choice is (C) (D) or so, I guess (A) is wrong", "A"),
        ("neither (A) nor (C), as it seems", "C"),
        ("neither (A) nor C. as it seems", "A"),  # brackets go before full stops
        ("say C: or D) to it", "C"),
        ("the DNA of it", "A"),  # a letter at the end of a word
        ("Because", "B"),  # a letter anywhere, where there is nothing else
        ("我选C吧", "C"),
        ("b", None),
        (" ., ", None),
        ("", None),
    ],
)
def test_lmms_extractor(text: str, letter: str | None) -> None:
    assert extract_lmms(text, "ABCD") == letter


def test_a_guess_is_the_same_for_an_item_and_spreads_over_items() -> None:
    assert guess("q1", "ABCD") == guess("q1", "ABCD")
    drawn = [guess(f"q{number}", "ABCD") for number in range(400)]
    assert all(60 <= drawn.count(letter) <= 140 for letter in "ABCD")


def test_options_are_listed_one_a_line_in_either_style() -> None:
    assert listing(lettered(["x", "y"])) == "A. x\nB. y"
    assert listing(lettered(["x", "y"]), "({}) {}") == "(A) x\n(B) y"
