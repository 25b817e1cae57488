"""The one family of exceptions. A user's fault carries its own exit code and needs no traceback; anything else is our bug.

A message says, in this order: what is wrong, where (key, or file and record), what was found, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_STAGE_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: state is saved, the same command continues


class TinyLMMError(Exception):
    """Base of every exception that this package raises on purpose."""

    exit_code = EXIT_STAGE_FAILED


class UserError(TinyLMMError):
    """The input is at fault: the message alone is shown, the command ends with exit code 2."""

    exit_code = EXIT_USER


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the input: `where` (a key, or a file and record), `what`, and what to do about it."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" {self.fix}" if self.fix else "")


class ConfigError(UserError):
    """The run spec is at fault; every fault found is listed at once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...]]]:
        return ConfigError, (self.faults,)


class DataError(UserError):
    """An annotation file, a record or an image is at fault, or missing."""


class WaitingError(UserError):
    """A stage waits for what only the user can give; all else is done, and the same command continues."""


class IntegrityError(TinyLMMError):
    """A stored file is missing or differs from its recorded SHA-256; the message names it."""


class DiskError(TinyLMMError):
    """A disk is full or cannot be written; the message says which file, and what to do."""


class NonFiniteError(TinyLMMError):
    """A loss or gradient is NaN or infinite; raised on every rank before any weight is touched."""


class StageFailedError(TinyLMMError):
    """A stage ended with an error; its folder keeps log and traceback, and the same command resumes it."""


class ClaimLostError(StageFailedError):
    """Another process has taken the stage over; raised before the next write to what is now that one's."""


class StoppedError(TinyLMMError):
    """A signal ended the work, with all that is needed to go on with it on disk (exit code 75)."""

    exit_code = EXIT_STOPPED


def worst_exit_code(codes: Iterable[int]) -> int:
    """Return the one exit code of several endings: stopped before failed before wrong input before done."""
    found = set(codes)
    return next((code for code in (EXIT_STOPPED, EXIT_STAGE_FAILED, EXIT_USER) if code in found), EXIT_DONE)


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return `Did you mean 'x'?` for the closest of `allowed`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else ""


_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls, invisible format characters (direction marks), halves of characters, line separators."""
_JOINERS = "\u200c\u200d"
"""Format characters that belong to words and emoji."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Return `text` with what a terminal obeys instead of shows written as an escape: `\\x1b`, `\\u202e`, `\\ud800`.

    Args:
        keep: control characters that stay.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = keep + _JOINERS
    return "".join(
        c if c in kept or unicodedata.category(c) not in _ESCAPED else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
