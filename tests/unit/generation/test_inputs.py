"""Images and histories in the forms that people have them in; anything else is told in a sentence."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tinylmm.errors import DataError, TinyLMMError, UserError
from tinylmm.generation.inputs import Exchange, as_list, conversation, decode, placed

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8))


def png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


def forms(folder: Path) -> dict[str, Any]:
    (folder / "a.png").write_bytes(png())
    pixels = np.asarray(PICTURE)
    return {
        "path": folder / "a.png",
        "text": str(folder / "a.png"),
        "bytes": png(),
        "open file": io.BytesIO(png()),
        "data URL": "data:image/png;base64," + base64.b64encode(png()).decode(),
        "PIL": PICTURE,
        "PIL with alpha": PICTURE.convert("RGBA"),
        "numpy": pixels,
        "numpy not in rows": np.asfortranarray(pixels),
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    }


def test_every_form_of_an_image_is_the_same_image(tmp_path: Path) -> None:
    for form, image in forms(tmp_path).items():
        [alone] = as_list(image)
        assert np.array_equal(np.asarray(decode(alone)), np.asarray(PICTURE)), form
        assert len(as_list([image, image])) == 2


def test_grey_pixels_become_rgb() -> None:
    assert decode(np.full((3, 5), 7, dtype=np.uint8)).getpixel((4, 2)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), r"numpy array of shape \(4, 4, 3\) and type float64.*scaled to 0 to 255"),
        (torch.rand(3, 4, 4), r"tensor of shape \(3, 4, 4\) and type torch.float32"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"tensor of shape \(1, 3, 4, 4\)"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"numpy array of shape \(3, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\)"),
        (b"no image", "the image's bytes: not a readable"),
        (io.BytesIO(b""), "the open image file: not a readable"),
        ("data:image/png;base64,!!", "a data URL that is no base64"),
        ("a\0b.png", "no such image file"),
        ("http://example.org/cat.png", "nothing is downloaded"),
        (7, "an image is given as int; allowed: a file's path"),
    ],
)
def test_other_forms_are_refused_with_what_is_allowed(image: Any, message: str) -> None:
    with pytest.raises(TinyLMMError, match=message):
        decode(image)


def test_openai_messages_are_the_exchanges_that_they_hold() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A duck."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    system, exchanges = conversation(messages)
    assert system == "Be brief."
    assert exchanges == [Exchange("<image>\nWhat?", "A duck.", ("a.png",)), Exchange("Sure?", "Yes.")]
    assert conversation([("What?", "A duck."), exchanges[1]]) == (None, [Exchange("What?", "A duck."), exchanges[1]])
    assert conversation([]) == (None, [])


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([None, " Why? "], "<image>\nWhy?"),
        ([None, None, " Why?", "Now "], "<image>\n<image>\nWhy?\nNow"),
        (["Is ", None, " red"], "Is\n<image>\nred"),
        (["Is <image> red? ", None], "Is <image> red? "),
        ([None, None], "<image>\n<image>\n"),
        (["a ", " b"], "a \n b"),
    ],
)
def test_images_of_a_message_stand_where_its_parts_or_its_text_say(parts: list[str | None], text: str) -> None:
    assert placed(parts) == text


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([{"role": "user", "content": "hi"}], "the roles user; they must be user and assistant in turn"),
        ([{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}], "the roles assistant, user"),
        ([{"role": "tool", "content": "hi"}], r"history\[0\] has the role 'tool'; allowed: system, user, assistant"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"history\[0\] has the content \"\{'type': 'video'\}\""),
        ([{"role": "user"}], r"history\[0\] has the content 'None'"),
        ([("a", "b"), {"role": "user", "content": "hi"}], r"history\[1\] is .*all of them messages"),
        (["ab"], r"history\[0\] is 'ab'"),
        ([("a", 7)], r"history\[0\] is"),
    ],
)
def test_other_histories_are_refused_with_what_is_allowed(history: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        conversation(history)


def test_a_missing_file_is_a_fault_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cat\.png: no such image file"):
        decode(tmp_path / "cat.png")
