"""Pieces of a text as its tokens come: joined they are the answer, and nothing is taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tinylmm.generation.text import Pieces


def told(text: str | bytes, stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """Byte by byte, as a byte-level tokenizer may."""
    raw = text.encode() if isinstance(text, str) else text
    pieces = Pieces(lambda ids: bytes(ids).decode("utf-8", "replace"), stops)
    found = [pieces.add(byte) for byte in raw]
    return [piece for piece in [*found, pieces.finish()] if piece], pieces.stopped


@pytest.mark.parametrize(
    ("text", "stops", "answer", "stopped"),
    [
        ("  a red 3 \n", [], "a red 3", False),
        ("née 🙂 x", [], "née 🙂 x", False),
        ("a red 3. And more", ["."], "a red 3", True),
        ("one STOP two", ["STOP", "two"], "one", True),
        ("one STO two", ["STOP"], "one STO two", False),
        ("ends in STO", ["STOP"], "ends in STO", False),
        ("aaab", ["aab"], "a", True),
        ("\nfirst\nsecond", ["\n"], "", True),
        ("a 🙂 b", ["🙂"], "a", True),
        (" \n ", [], "", False),
    ],
)
def test_pieces_join_to_the_answer_before_its_first_stop(
    text: str, stops: list[str], answer: str, stopped: bool
) -> None:
    pieces, at_stop = told(text, stops)
    assert ("".join(pieces), at_stop) == (answer, stopped)


def test_a_character_that_never_ends_is_told_at_the_end() -> None:
    assert told(b"ab" + b"\xf0\x9f") == (["a", "b", "\ufffd"], False)
