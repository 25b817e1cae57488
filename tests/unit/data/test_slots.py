"""Where images stand in questions, and how many positions they take."""

from __future__ import annotations

import pytest

from tinylmm.constants import IGNORE_INDEX, IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.data.chat import TEMPLATES, Turn
from tinylmm.data.slots import expand, positions_of, question


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("What?", 0, "What?"),
        (" What? ", 1, "<image>\nWhat?"),
        ("Which?", 2, "<image>\n<image>\nWhich?"),
        ("What <image>?", 1, "What <image>?"),
        ("Is <image> or <image> red?", 2, "Is <image> or <image> red?"),
        ("<image>\nWhat?", 0, "What?"),
        ("Is <image> red?", 2, "<image>\n<image>\nIs  red?"),
        ("", 1, "<image>\n"),
    ],
)
def test_a_question_has_a_slot_for_each_image_its_own_or_in_front(text: str, images: int, expected: str) -> None:
    turn = question(text, images)
    assert turn == Turn(expected, None) and turn.num_images == images
    assert question(text, images, "yes").assistant == "yes"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "native"])
def test_a_question_that_is_only_an_image_has_no_white_space_around_it(name: str) -> None:
    text = TEMPLATES[name].text([Turn("<image>", "Two ducks.")])
    for only in ("<image>\n\n", " <image>", "\n<image> "):
        assert TEMPLATES[name].text([Turn(only, "Two ducks.")]) == text
    assert "Two ducks." in text and f"{IMAGE_SLOT}\n\n" not in text


def test_ids_and_labels_expand_alike() -> None:
    ids = [5, IMAGE_TOKEN_ID, 6, IMAGE_TOKEN_ID, 7]
    positions = positions_of(ids, [2, 3])
    assert positions == [1, 2, 1, 3, 1]
    assert expand(ids, positions) == [5, *[IMAGE_TOKEN_ID] * 2, 6, *[IMAGE_TOKEN_ID] * 3, 7]
    assert expand([IGNORE_INDEX, IGNORE_INDEX, 6, 1, 7], positions) == [*[IGNORE_INDEX] * 3, 6, 1, 1, 1, 7]


@pytest.mark.parametrize(("counts", "which"), [([2], "more"), ([2, 3, 4], "fewer")])
def test_slots_and_images_that_differ_in_number_are_an_error(counts: list[int], which: str) -> None:
    with pytest.raises(ValueError, match=f"{which} image slots than images"):
        positions_of([IMAGE_TOKEN_ID, IMAGE_TOKEN_ID], counts)
