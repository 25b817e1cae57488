"""How a copy of a process ends: with what it was made for, and without its parent's own clearing up."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import NoReturn


def end_after(act: Callable[[], object]) -> NoReturn:
    """In a fork: do this and end the process, with 0, the code that it exits with, or 1 after an error, which is printed."""
    code = 1
    try:
        act()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
