"""Scenes: what is drawn is what is said, questions have one answer, and a blind guesser has no luck."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tinylmm.data.scenes import (
    CATEGORIES,
    COLOURS,
    COUNT_SHARES,
    NUM_OPTIONS,
    SIZE,
    Glyph,
    Rng,
    Scans,
    Scene,
    ask,
    caption,
    dense_caption,
    description,
    pairs,
    render,
    sample_scene,
    short_caption,
)

SCENE: Scene = (Glyph(3, "red", "top left", 0), Glyph(7, "blue", "bottom right", 1))


def rng(number: int = 0) -> Rng:
    return np.random.default_rng(number)


def scenes(count: int) -> list[Scene]:
    scans = Scans("train")
    return [sample_scene(rng(index), scans) for index in range(count)]


def test_no_scan_is_both_in_training_and_held_out() -> None:
    def drawn(split: str) -> set[int]:
        scans, random = Scans(split), rng()
        return {scans.draw(digit, random) for digit in range(10) for _ in range(100)}

    assert drawn("train").isdisjoint(drawn("held_out"))


def test_a_drawn_scan_shows_the_digit_asked_for() -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    scans = Scans("held_out")
    assert all(labels[scans.draw(digit, rng(seed))] == digit for digit in range(10) for seed in range(5))


def test_digits_colours_and_places_each_name_one_object_of_a_scene() -> None:
    for scene in scenes(200):
        for values in zip(*((g.digit, g.colour, g.place) for g in scene), strict=True):
            assert len(set(values)) == len(scene)


def test_scenes_have_one_two_or_three_digits_in_their_shares() -> None:
    counts = Counter(len(scene) for scene in scenes(600))
    assert set(counts) == {1, 2, 3}
    assert all(abs(counts[n] / 600 - share) < 0.06 for n, share in zip((1, 2, 3), COUNT_SHARES, strict=True))


@pytest.mark.parametrize("colour", COLOURS)
def test_a_corner_has_its_digit_s_colour_and_the_others_stay_dark(colour: str) -> None:
    scans = Scans("train")
    pixels = render((Glyph(8, colour, "top right", scans.draw(8, rng())),), scans, rng()).astype(int)
    assert pixels.shape == (SIZE, SIZE, 3)
    corner = pixels[:16, 16:].reshape(-1, 3)
    brightest = corner[corner.max(axis=1).argmax()]
    distances = {name: np.abs(brightest - np.array(rgb)).sum() for name, rgb in COLOURS.items()}
    assert min(distances, key=lambda name: distances[name]) == colour
    assert pixels[16:].max() < 110


def test_wordings_of_one_scene() -> None:
    assert caption(SCENE) == "a red 3 top left and a blue 7 bottom right"
    assert dense_caption(SCENE) == (
        "there are 2 digits in the picture. top left is a red 3. top right is empty. bottom left is empty. "
        "bottom right is a blue 7. in order they read 3 7."
    )
    assert {short_caption(SCENE, rng(seed)) for seed in range(50)} == {
        "a red 3 top left and a blue 7 bottom right",
        "a red 3 and a blue 7",
        "a 3 top left and a 7 bottom right",
        "a 3 and a 7",
    }


def test_a_description_in_words_leaves_nothing_out() -> None:
    for seed in range(50):
        text = description(SCENE, rng(seed))
        assert all(word in text for word in ("red", "3", "top left", "blue", "7", "bottom right")), text


def test_pairs_are_true_and_different() -> None:
    true = {"red 3", "3 red", "top left 3", "top left red", "blue 7", "7 blue", "bottom right 7", "bottom right blue"}
    assert set(pairs(SCENE, rng()).split(", ")) == true


@pytest.mark.parametrize(
    ("category", "answers"),
    [
        ("digit", {("what digit is red?", "3"), ("what digit is top left?", "3")}),
        ("colour", {("what colour is the 3?", "red"), ("what colour is the digit top left?", "red")}),
        ("count", {("how many digits are there?", "2")}),
        ("number", {("read the digits in order.", "3 7")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_questions_and_answers_of_one_scene(category: str, answers: set[tuple[str, str]]) -> None:
    asked = [ask(category, SCENE, rng(seed)) for seed in range(60)]
    assert answers <= {(question.text, question.answer) for question in asked}


def test_yes_and_no_are_equally_frequent_and_true() -> None:
    asked = [ask("yesno", SCENE, rng(seed)) for seed in range(2000)]
    assert 900 < sum(question.answer == "yes" for question in asked) < 1100
    for question in asked:
        thing = question.text.removeprefix("is there a ").split("?")[0].split()[0]
        assert (thing in {"3", "7", "red", "blue"}) == (question.answer == "yes"), question


def test_a_choice_offers_the_digit_among_different_others_in_any_order() -> None:
    places = Counter()
    for seed in range(400):
        question = ask("choice", SCENE, rng(seed))
        listed = question.text.split(": ")[1].removesuffix("?").replace(" or ", ", ").split(", ")
        assert len(set(listed)) == NUM_OPTIONS == question.options
        assert question.answer == ("3" if "red" in question.text or "top left" in question.text else "7")
        assert {"3", "7"} <= set(listed)
        places[listed.index(question.answer)] += 1
    assert min(places.values()) > 70


def test_always_giving_the_most_frequent_answer_scores_little() -> None:
    best = []
    for category in CATEGORIES:
        answers = Counter(ask(category, scene, rng(index)).answer for index, scene in enumerate(scenes(600)))
        best.append(answers.most_common(1)[0][1] / 600)
    assert sum(best) / len(best) < 0.3


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown category 'size'"):
        ask("size", SCENE, rng())
