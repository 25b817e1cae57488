"""The radix tree gives back what it was given, in the order it was given, and keeps to its limit."""

from __future__ import annotations

import random

import torch

from tinylmm.generation.prefixes import Prefixes, Symbol, common
from tinylmm.generation.row_cache import Segment

LAYERS = 2


def code(symbols: tuple[Symbol, ...]) -> torch.Tensor:
    """A number for each symbol, (1, n, 1): stands for its keys."""
    return torch.tensor([float(hash((symbol, "key")) % 9973) for symbol in symbols]).reshape(1, -1, 1)


def keep(prefixes: Prefixes, symbols: tuple[Symbol, ...]) -> list[int]:
    """Keep a row; returns how many tokens were copied for it."""
    copied = []

    def copy(begin: int, end: int) -> Segment:
        copied.append(end - begin)
        return [(code(symbols[begin:end]) + layer, -code(symbols[begin:end])) for layer in range(LAYERS)]

    prefixes.add(symbols, copy)
    return copied


def check(prefixes: Prefixes, symbols: tuple[Symbol, ...]) -> int:
    """What is found is what belongs to the first symbols; returns how many."""
    length, segments = prefixes.match(symbols)
    for layer in range(LAYERS):
        keys = torch.cat([segment[layer][0] for segment in segments], 1) if segments else torch.empty(1, 0, 1)
        assert torch.equal(keys, code(symbols[:length]) + layer if length else keys) and keys.shape[1] == length
    return length


def test_what_two_rows_share_is_kept_once() -> None:
    prefixes = Prefixes(100)
    image = ("a",) * 6
    assert keep(prefixes, (1, 2, *image, 3, 4)) == [10]
    assert keep(prefixes, (1, 2, *image, 5)) == [1]
    assert keep(prefixes, (1, 2, *image, 3, 4)) == keep(prefixes, (1, 2)) == []
    assert prefixes.tokens == 11
    assert check(prefixes, (1, 2, *image, 3, 4, 9)) == 10
    assert check(prefixes, (1, 2, *image, 5, 9)) == 9
    assert check(prefixes, (1, 2, *("b",) * 6, 3)) == 2  # another image
    assert check(prefixes, (9,)) == check(prefixes, ()) == 0


def test_what_was_not_used_for_the_longest_time_goes_first_and_ends_before_beginnings() -> None:
    prefixes = Prefixes(12)
    for last in (3, 4, 5):
        keep(prefixes, (1, 2, *[last] * 3))
    assert prefixes.tokens == 11
    check(prefixes, (1, 2, 3, 3, 3))
    keep(prefixes, (1, 2, 6, 6))
    assert prefixes.tokens == 10
    assert [check(prefixes, (1, 2, last, last, last)) for last in (3, 4, 5, 6)] == [5, 2, 5, 4]
    keep(prefixes, tuple(range(50, 70)))  # never fits
    assert prefixes.tokens == 10
    nothing = Prefixes(0)
    keep(nothing, (1, 2))
    assert (nothing.tokens, nothing.match((1, 2))) == (0, (0, []))


def test_a_day_of_random_rows_finds_the_longest_beginning_that_can_be_there() -> None:
    draw = random.Random(0)
    unlimited, limited = Prefixes(10**6), Prefixes(60)
    seen: list[tuple[Symbol, ...]] = []
    for _ in range(400):
        row: tuple[Symbol, ...] = tuple(draw.choice([1, 2, "x"]) for _ in range(draw.randint(1, 12)))
        longest = max((common(row, other) for other in seen), default=0)
        assert check(unlimited, row) == longest
        assert check(limited, row) <= longest and limited.tokens <= 60
        keep(unlimited, row)
        keep(limited, row)
        seen.append(row)
