"""Rows of work files that a later try goes on from: JSON lines that each prove themselves. No torch.

A line is the row's JSON with one more field, `crc`, of all that stands before it. Whoever reads the file by other means reads
plain JSON lines; whoever goes on from it drops the lines that do not fit, whatever happened to them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_END = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


def frame(row: dict[str, Any]) -> bytes:
    """Return a row, which has a field at least, as one line with its checksum."""
    text = json.dumps(row, ensure_ascii=False).encode()
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def unframe(line: bytes) -> dict[str, Any] | None:
    """Return the row that `frame` wrote, or None if a bit of the line (without its end) is another."""
    end = _END.search(line)
    if end is None:
        return None
    text = line[: end.start()] + b"}"
    if zlib.crc32(text) != int(end[1], 16):
        return None
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (line number from 1, row or None where it does not fit) of all lines; behind the last line end stands nothing."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        yield number, unframe(line)
