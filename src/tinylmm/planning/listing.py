"""Identity of image files by content: which there are, and what is in each; a million of them in a second when nothing changed.

Of an image of more than 2 * EDGE_BYTES the size and both ends are hashed: the compressed formats that we read change behind an
edit and up to their checksum or end marker, and to read a million files from end to end just to plan a run would take longer
than many a run. What was read of each is kept under its size, time and inode; these are looked up every time. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from tinylmm.planning.cache import Cache

MISSING_SHOWN = 20
EDGE_BYTES = 4096
"""Of a large image, so much of its beginning and of its end is hashed."""
BLOCK = 8192
"""Names that are looked up at a time."""
_READERS = 8
"""Threads that read images, and that look them up where it is waiting that takes the time, as on a network's disk."""
_SLOW_SECONDS = 5e-5
"""What takes longer than this to look up is waited for."""
_JOINED = 1 << 18
"""Names that are collected before they are joined with those of before."""
_EDGES = 16
"""Bytes of an image's hash."""
_GONE = (-1, 0, 0)
"""State of an image that is not there, or cannot be read."""


@dataclass(frozen=True)
class Names:
    """Distinct names in order: their texts one behind the other, and where each ends. A tenth of the memory of a list."""

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Collect names, whatever their order and however often each comes; those that no file can have are left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        names = iter(names)
        known = pa.array([], pa.large_string())
        parts: list[Any] = []
        while batch := list(islice(names, _JOINED)):
            encodable = [name for name in set(batch) if not _is_broken(name)]
            parts.append(pa.array(encodable, pa.large_string()))
            if sum(map(len, parts)) > len(known):
                known, parts = pc.unique(pa.concat_arrays([known, *parts])), []
        known = pc.unique(pa.concat_arrays([known, *parts]))
        known = known.take(pc.sort_indices(known)) if len(known) else known
        _, offsets, text = known.buffers()
        ends = np.frombuffer(offsets, np.int64)[: len(known) + 1][1:]
        size = int(ends[-1]) if len(ends) else 0
        return cls(np.frombuffer(text, np.uint8)[:size].copy() if size else np.zeros(0, np.uint8), ends.copy())

    def __len__(self) -> int:
        return len(self.ends)

    def blocks(self) -> Iterator[list[str]]:
        """Yield the names, BLOCK at a time."""
        begin = 0
        for first in range(0, len(self.ends), BLOCK):
            ends = self.ends[first : first + BLOCK].tolist()
            piece = self.text[begin : ends[-1]].tobytes()
            starts = [0, *(end - begin for end in ends)]
            yield [piece[a:b].decode() for a, b in pairwise(starts)]
            begin = ends[-1]

    @property
    def digest(self) -> str:
        """SHA-256 of all names."""
        found = hashlib.sha256(self.ends.data)
        found.update(self.text.data)
        return found.hexdigest()


def _is_broken(name: str) -> bool:
    """Whether a name holds half a character, which no file system takes."""
    return not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name)


def image_listing(root: Path, names: Names, cache_folder: Path) -> dict[str, Any]:
    """Return {"images", "num_images", "missing", "num_missing"} of the files that `names` name below `root`.

    `images` is the SHA-256 of (path, size, content) of all; one that is missing counts as size -1. What the names name is
    only read where it is a regular file; they are no promise of an image, nor of one below `root`.
    """
    cache = Cache(cache_folder, {"images": str(root), "of": names.digest}, {})
    known = cache.read()
    states, slow = [], False
    with ThreadPoolExecutor(_READERS) as threads:
        for block in names.blocks():
            began = time.monotonic()
            states.append(_spread(threads, root, block) if slow else _look_up(root, block))
            slow = time.monotonic() - began > _SLOW_SECONDS * len(block)
        state = np.concatenate([np.zeros((0, 3), np.int64), *states])
        if known is not None and np.array_equal(known.arrays["state"], state):
            return dict(known.value)
        edges = _edges_of_all(threads, root, names, state, None if known is None else known.arrays)
    value = {"images": _digest(names, state, edges), "num_images": len(names), **_missing(names, state)}
    cache.write(value, state=state, edges=edges)
    return value


def _spread(threads: ThreadPoolExecutor, root: Path, names: list[str]) -> np.ndarray:
    share = -(-len(names) // _READERS)
    parts = [names[first : first + share] for first in range(0, len(names), share)]
    return np.concatenate(list(threads.map(lambda part: _look_up(root, part), parts)))


def _look_up(root: Path, names: list[str]) -> np.ndarray:
    """(N, 3) int64: size, modification time and inode of each; size -1 of what is not there, -2 - size of no regular file."""
    prefix, found, stat = f"{root}/", [], os.stat
    for name in names:
        try:
            seen = stat(prefix + name)
        except (OSError, ValueError):
            found.append(_GONE)
            continue
        size = seen.st_size if S_ISREG(seen.st_mode) else -2 - seen.st_size
        found.append((size, seen.st_mtime_ns, seen.st_ino))
    return np.array(found, np.int64).reshape(-1, 3)


def _edges_of_all(
    threads: ThreadPoolExecutor, root: Path, names: Names, state: np.ndarray, known: Any | None
) -> np.ndarray:
    """(N, 16) uint8: what is in each image, read only where its state is not the known one.

    One that cannot be read becomes missing in `state`: so it is named before anything starts, and tried again the next time.
    """
    edges = np.zeros((len(names), _EDGES), np.uint8)
    todo = state[:, 0] >= 0
    if known is not None and known["state"].shape == state.shape:
        same = (known["state"] == state).all(axis=1)
        edges[same] = known["edges"][same]
        todo &= ~same
    first = 0
    for block in names.blocks():
        chosen = np.flatnonzero(todo[first : first + len(block)])
        paths = [(f"{root}/{block[number]}", int(state[first + number, 0])) for number in chosen]
        read = threads.map(_edges_of_some, [paths[begin : begin + 64] for begin in range(0, len(paths), 64)])
        for number, content in zip(chosen, (content for some in read for content in some), strict=True):
            if content is None:
                state[first + number] = _GONE
            else:
                edges[first + number] = np.frombuffer(content, np.uint8)
        first += len(block)
    return edges


def _edges_of_some(paths: list[tuple[str, int]]) -> list[bytes | None]:
    return [edges_of(path, size) for path, size in paths]


def edges_of(path: str, size: int) -> bytes | None:
    """16 bytes of the SHA-256 of a file's first and last EDGE_BYTES, or of all of a small one; None if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a million calls, and pathlib's are three times slower
            content = file.read(2 * EDGE_BYTES) if size <= 2 * EDGE_BYTES else file.read(EDGE_BYTES)
            if size > 2 * EDGE_BYTES:
                file.seek(-EDGE_BYTES, os.SEEK_END)
                content += file.read(EDGE_BYTES)
    except OSError:
        return None
    return hashlib.sha256(content).digest()[:_EDGES]


def _digest(names: Names, state: np.ndarray, edges: np.ndarray) -> str:
    listing, first = hashlib.sha256(), 0
    for block in names.blocks():
        sizes = state[first : first + len(block), 0].tolist()
        content = edges[first : first + len(block)].tobytes().hex()
        for number, (name, size) in enumerate(zip(block, sizes, strict=True)):
            if size >= 0:
                line = [name, size, content[32 * number : 32 * number + 32]]
            else:
                line = [name, -1 if size == -1 else -2 - size, ""]
            listing.update(json.dumps(line).encode() + b"\n")
        first += len(block)
    return listing.hexdigest()


def _missing(names: Names, state: np.ndarray) -> dict[str, Any]:
    places = np.flatnonzero(state[:, 0] == -1)
    shown, first = [], 0
    wanted = set(places[:MISSING_SHOWN].tolist())
    for block in names.blocks() if wanted else ():
        shown += [name for number, name in enumerate(block, first) if number in wanted]
        first += len(block)
        if len(shown) == len(wanted):
            break
    return {"missing": shown, "num_missing": len(places)}
