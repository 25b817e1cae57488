"""How a command ends: our own errors as their message and exit code, anything else with its traceback."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from tinylmm.errors import EXIT_STOPPED, TinyLMMError, printable


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; the message of an error of ours goes to stderr without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character loses it, never the work
    logging.captureWarnings(True)  # a warning belongs into the log, not between a progress line and a table
    logging.getLogger().setLevel(logging.INFO)
    try:
        return command() or 0
    except TinyLMMError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        return EXIT_STOPPED
