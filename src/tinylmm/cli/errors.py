"""How a command ends: our own errors as their message and exit code, anything else with its traceback."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tinylmm.errors import EXIT_STOPPED, DiskError, TinyLMMError, printable
from tinylmm.stop import TerminatedError, ended_by_signals
from tinylmm.store.disk import refusal


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; the message of an error of ours goes to stderr without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character loses it, never the work
    sys.excepthook = _show_traceback
    logging.captureWarnings(True)  # a warning belongs into the log, not between a progress line and a table
    logging.getLogger().setLevel(logging.INFO)
    try:
        with ended_by_signals():
            return command() or 0
    except TinyLMMError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return error.exit_code
    except Exception as error:
        if (said := refusal(error, Path.cwd())) is None:
            raise
        sys.stderr.write(f"{printable(said)}\n")
        return DiskError.exit_code
    except (KeyboardInterrupt, TerminatedError) as end:
        by = f" by {end}" if isinstance(end, TerminatedError) else ""
        sys.stderr.write(f"interrupted{by}; the same command continues\n")
        return EXIT_STOPPED


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own last words, with what a terminal would obey written out: a bug may quote a record."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
