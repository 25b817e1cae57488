"""What was found of files outside the store, kept for as long as they stay as they are. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinylmm.errors import DiskError
from tinylmm.store.disk import writing
from tinylmm.store.integrity import write_atomic
from tinylmm.store.stage import digest

log = logging.getLogger(__name__)

_FORMAT = 5


@dataclass(frozen=True)
class Known:
    """What a cache file holds: some JSON, and arrays, which take a tenth of the memory of lists."""

    value: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Cache:
    """One file for one state of what lies on disk: a checksum, a line of JSON, and the arrays' bytes.

    Args:
        folder: of all cache files.
        where: what is cached; names the file.
        state: how it was found (sizes, times): what was cached for another state counts as none.
    """

    def __init__(self, folder: Path, where: dict[str, Any], state: dict[str, Any]) -> None:
        self.path = folder / f"{digest(where)[:32]}.json"
        self.key = {"format": _FORMAT, **where, **state}

    def read(self) -> Known | None:
        """What was cached for the state as it is now; a damaged or foreign cache file counts as none."""
        try:
            content = memoryview(self.path.read_bytes())
            rest = content[65:]
            if bytes(content[:64]).decode() != hashlib.sha256(rest).hexdigest():
                return None
            end = self._end_of_line(content)
            record = json.loads(bytes(content[65:end]))
            if not isinstance(record, dict) or record.get("key") != self.key:
                return None
            arrays, begin = {}, end + 1
            for name, (kind, shape, size) in record["arrays"].items():
                arrays[name] = np.frombuffer(content[begin : begin + size], kind).reshape(shape)
                begin += size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with contextlib.suppress(OSError):  # of a store that can only be read
            os.utime(self.path)  # it was of use: `store gc` deletes what was not for long
        return Known(record["value"], arrays)

    def write(self, value: dict[str, Any], **arrays: np.ndarray) -> None:
        """Replace the cache file, so that another process never reads half of it.

        Where the store cannot be written there is no cache, and all is read anew each time: planning needs none.
        """
        listed = {name: [str(array.dtype), array.shape, array.nbytes] for name, array in arrays.items()}
        line = json.dumps({"key": self.key, "value": value, "arrays": listed}).encode() + b"\n"
        rest = b"".join([line, *(array.tobytes() for array in arrays.values())])
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest, durable=False)
        except DiskError as error:
            log.info("not cached: %s", error)

    @staticmethod
    def _end_of_line(content: memoryview) -> int:
        begin, block = 65, 1 << 16
        while begin < len(content):
            found = bytes(content[begin : begin + block]).find(b"\n")
            if found >= 0:
                return begin + found
            begin += block
        raise ValueError("no line")
