"""Arguments that all measurements share; argparse names a wrong one in a sentence and exits with 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def whole(least: int, multiple_of: int = 1) -> Callable[[str], int]:
    """A whole number of at least `least`, and a multiple of `multiple_of`."""

    def read(word: str) -> int:
        if not word.lstrip("-").isdigit() or int(word) < least or int(word) % multiple_of:
            kind = "whole number" if multiple_of == 1 else f"multiple of {multiple_of}"
            raise argparse.ArgumentTypeError(f"is '{word}'; use a {kind}, {least} or more")
        return int(word)

    return read


def choices(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Words with commas between them, all of them allowed, in the order in which they are allowed."""

    def read(words: str) -> list[str]:
        asked = words.split(",")
        for word in asked:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"has '{word}'; allowed, with commas between: {', '.join(allowed)}")
        return [name for name in allowed if name in asked]

    return read


def existing_folder(word: str) -> Path:
    """A folder that is there."""
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"is '{word}', which is no folder; make it, or name another")
    return Path(word)


def file_to_write(word: str) -> Path:
    """A file that can be written when all is measured: in a folder that is there."""
    if Path(word).is_dir() or not Path(word).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"is '{word}', which is no file in a folder that is there; name another")
    return Path(word)
