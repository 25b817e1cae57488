"""Claims about identity: equal content gives equal digests, whatever the order; a difference is named by its key."""

import math

import pytest

from tinylmm.store.stage import canonical_json, difference, digest


def test_order_of_keys_does_not_matter_and_order_of_items_does() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_the_canonical_form_is_compact_utf8_and_its_digest_is_fixed() -> None:
    assert canonical_json({"b": "é", "a": None}) == '{"a":null,"b":"é"}'
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_numbers_text_and_booleans_are_not_confused() -> None:
    assert len({digest(value) for value in (1, "1", True, None, 1.5, [1])}) == 6


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 -> 2"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1, 2]"]),
        ({"a": 1}, {"b": 1}, ["a: 1 -> (absent)", "b: (absent) -> 1"]),
        ({"a": 1}, {"a": 1}, []),
        (1, 2, ["(whole): 1 -> 2"]),
    ],
    ids=["nested", "item", "length", "keys", "equal", "leaf"],
)
def test_a_difference_is_named_by_its_key(old: object, new: object, lines: list[str]) -> None:
    assert difference(old, new) == lines
