"""Bytes of transformed images, kept for whoever reads the same image through the same transform again. No torch.

A folder below `pixels/` is one transform's shelf. Any number of processes of any number of runs add to it and read from it at
once, without a lock: each that adds has two files of its own, of which only it writes,

    <writer>.bytes  images one behind the other
    <writer>.index  a record an image, appended once the image's bytes are written: what it shows, where it lies, CRC-32s

so a process that is killed leaves at most bytes that no record speaks of. An image is found by what its file was when it was
read (path, size, time: its stamp), and where that is new by the file's content, so that copies and touched files share one
entry. What is read is checked; a damaged entry is struck out of its index for everybody, and made again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylmm.errors import DiskError
from tinylmm.store.disk import refusal
from tinylmm.store.integrity import write_atomic

log = logging.getLogger(__name__)

BYTES, INDEX = ".bytes", ".index"
ABOUT_FILE = "about.json"
"""In a shelf: what all of its images went through."""
KEY_BYTES = 16
"""Of stamps and contents, which are cut digests."""
_FIELDS = struct.Struct("<16s16sQIII")
_CHECK = struct.Struct("<I")
RECORD_BYTES = _FIELDS.size + _CHECK.size
_ELSEWHERE = 2**64 - 1
"""As an offset: the record only says that a stamp is of a content that another record has."""
LEFT_FREE = 1 << 30
"""Bytes of the disk that the shelves leave to checkpoints and results."""
FULL_WORDS = (
    "%s takes no more images: it has the size that launch.cache_pixels_gib allows, or its disk is nearly full; the others are "
    "decoded whenever they are read"
)


@dataclass(frozen=True)
class Record:
    """One image of a shelf.

    Attributes:
        stamp, content: KEY_BYTES each; what the file was, and what was in it.
        offset, size: of its bytes in the writer's file.
        crc: of these.
        views: how many tiles or frames they are; 0 of an image that is one view.
    """

    stamp: bytes
    content: bytes
    offset: int
    size: int
    crc: int
    views: int

    @property
    def has_bytes(self) -> bool:
        """Whether this record says where they lie."""
        return self.offset != _ELSEWHERE

    def pack(self) -> bytes:
        """The record in the index."""
        fields = _FIELDS.pack(self.stamp, self.content, self.offset, self.size, self.crc, self.views)
        return fields + _CHECK.pack(zlib.crc32(fields))

    @classmethod
    def unpack(cls, line: bytes) -> Record | None:
        """What was packed; None of anything else, and of what was struck out."""
        fields = line[: _FIELDS.size]
        if len(line) < RECORD_BYTES or _CHECK.unpack(line[_FIELDS.size :])[0] != zlib.crc32(fields):
            return None
        return cls(*_FIELDS.unpack(fields))


@dataclass(frozen=True)
class Views:
    """An image's bytes, and how many views they are; 0 where it is one view, without a dimension for them."""

    data: bytes | memoryview
    views: int


class PixelShelf:
    """One transform's images: read where they are kept, made and kept where they are not.

    An object may be copied into other processes (`fork`, or by pickling); each then adds to files of its own. One thread at a
    time may use it.

    Args:
        root: the store's folder of shelves.
        key: of this one, which stands for all that decides the bytes.
        limit: bytes that all shelves of the store may take together.
        about: what the key stands for, for people.

    Attributes:
        reads: images that were asked for, and
        hits: those of them that were kept, since `take` was called last.
    """

    def __init__(self, root: Path, key: str, limit: int, about: Mapping[str, Any]) -> None:
        self.folder = root / key
        self.limit = limit
        self.about = dict(about)
        self.reads = self.hits = 0
        self._writers: dict[str, int] = {}  # name -> number
        self._names: list[str] = []
        self._known: list[int] = []  # records of each that were read
        self._stamps: dict[bytes, bytes] = {}
        self._places: dict[bytes, int] = {}
        self._own: tuple[int, str] | None = None
        self._takes = True

    @property
    def exists(self) -> bool:
        """Whether somebody has kept images here."""
        return self.folder.is_dir()

    def read(self, stamp: bytes, content: Callable[[], bytes], make: Callable[[], Views]) -> Views:
        """Return an image's bytes.

        Args:
            stamp: KEY_BYTES that stand for the file as it is now.
            content: gives KEY_BYTES that stand for what is in it; asked where the stamp is new.
            make: gives the bytes; asked where they are not kept.
        """
        self.reads += 1
        found = self._stamped(stamp)
        if found is None:
            self._look()
            found = self._stamped(stamp)
        if found is None:
            key = content()
            found = self._kept(key)
            if found is None:
                made = make()
                self._keep(stamp, key, made)
                return made
            self._say(Record(stamp, key, _ELSEWHERE, 0, 0, 0))
        self.hits += 1
        return found

    def take(self) -> tuple[int, int]:
        """Return `reads` and `hits`, and begin to count anew."""
        counted = self.reads, self.hits
        self.reads = self.hits = 0
        return counted

    def taken(self) -> int:
        """Bytes that all shelves take."""
        return folder_bytes(self.folder.parent)

    def _stamped(self, stamp: bytes) -> Views | None:
        content = self._stamps.get(stamp)
        return None if content is None else self._kept(content)

    def _kept(self, content: bytes) -> Views | None:
        """The bytes of a content; None where they are not kept, or not as they were written."""
        place = self._places.get(content)
        if place is None:
            return None
        writer, number = self._names[place >> 32], place & 0xFFFFFFFF
        try:
            record = Record.unpack(_read(self.folder / f"{writer}{INDEX}", number * RECORD_BYTES, RECORD_BYTES))
            if record is not None:
                data = _read(self.folder / f"{writer}{BYTES}", record.offset, record.size)
                if len(data) == record.size and zlib.crc32(data) == record.crc:
                    return Views(data, record.views)
                _strike(self.folder / f"{writer}{INDEX}", number)
                log.warning("an image kept in %s is damaged: it is decoded again", self.folder / f"{writer}{BYTES}")
        except OSError as error:
            log.warning("an image kept in %s cannot be read (%s): it is decoded again", self.folder, error)
        del self._places[content]
        return None

    def _look(self) -> None:
        """Take note of what all writers have added."""
        for name, size in _files(self.folder):
            if not name.endswith(INDEX):
                continue
            writer, count = self._number(name.removesuffix(INDEX)), size // RECORD_BYTES
            known = self._known[writer]
            if count > known:
                lines = _read(self.folder / name, known * RECORD_BYTES, (count - known) * RECORD_BYTES)
                for number, record in enumerate(_records(lines), known):
                    if record is not None:
                        self._note(record, writer << 32 | number)
                self._known[writer] = known + len(lines) // RECORD_BYTES

    def _number(self, writer: str) -> int:
        """A writer's, which is given when it is met first."""
        if writer not in self._writers:
            self._writers[writer] = len(self._names)
            self._names.append(writer)
            self._known.append(0)
        return self._writers[writer]

    def _note(self, record: Record, place: int) -> None:
        self._stamps[record.stamp] = record.content
        if record.has_bytes:
            self._places[record.content] = place

    def _keep(self, stamp: bytes, content: bytes, made: Views) -> None:
        """Add an image, while there is room for it. The file grows first: of two who see the last room none takes it twice."""
        size = len(made.data)
        if not self._takes:
            return
        try:
            path = self.folder / f"{self._writer()}{BYTES}"
            offset = path.stat().st_size if path.exists() else 0
            with path.open("ab") as file:
                file.truncate(offset + size)
                if self.taken() + RECORD_BYTES > self.limit or _free(self.folder) < LEFT_FREE:
                    file.truncate(offset)
                    self._takes = False
                    log.info(FULL_WORDS, self.folder.parent)
                    return
            with path.open("r+b", buffering=0) as file:
                file.seek(offset)
                _write(file.fileno(), made.data)
        except (OSError, DiskError) as error:
            self._refused(error)
            return
        self._say(Record(stamp, content, offset, size, zlib.crc32(made.data), made.views))

    def _say(self, record: Record) -> None:
        """Append a record to this process's index."""
        if not self._takes:
            return
        try:
            writer = self._writer()
            with (self.folder / f"{writer}{INDEX}").open("ab", buffering=0) as file:
                number = file.tell() // RECORD_BYTES
                _write(file.fileno(), record.pack())
        except (OSError, DiskError) as error:
            self._refused(error)
            return
        place = self._number(writer)
        self._known[place] = number + 1
        self._note(record, place << 32 | number)

    def _refused(self, error: Exception) -> None:
        self._takes = False
        said = refusal(error, self.folder) or str(error)
        log.warning("no more images are kept in %s, and training goes on: %s", self.folder, said)

    def _writer(self) -> str:
        """Name of this process's files, which no other has; a fork has its own."""
        if self._own is None or self._own[0] != os.getpid():
            self._own = (os.getpid(), secrets.token_hex(8))
            if not describe_shelf(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / ABOUT_FILE, json.dumps(self.about, sort_keys=True), durable=False)
        return self._own[1]


def count_images(folder: Path) -> int:
    """How many images a shelf has."""
    records = (record for path in sorted(folder.glob(f"*{INDEX}")) for record in _records(path.read_bytes()))
    return len({record.content for record in records if record is not None and record.has_bytes})


def describe_shelf(folder: Path) -> str:
    """` of 384 x 384 pixels (squash)`, behind a number of images; nothing where the shelf does not say what it is of."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        return f" of {about['size']} x {about['size']} pixels ({about['mode']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_shelf(folder: Path, deep: bool = True) -> list[str]:
    """Return what is wrong with a shelf, a sentence a finding: records that cannot be read, images that are not as written.

    Args:
        deep: read the images too.
    """
    if not describe_shelf(folder):
        return [f"{folder / ABOUT_FILE} is missing or damaged."]
    found = []
    for path in sorted(folder.glob(f"*{INDEX}")):
        lines, data = path.read_bytes(), path.with_suffix(BYTES)
        there = data.stat().st_size if data.exists() else 0
        for number, record in enumerate(_records(lines)):
            if record is None:
                if lines[number * RECORD_BYTES :][:RECORD_BYTES].strip(b"\0"):  # nothing but zeros was struck out
                    found.append(f"{path}: record {number} is damaged.")
            elif record.has_bytes and record.offset + record.size > there:
                found.append(f"{data}: the image of record {number} is cut short.")
            elif deep and record.has_bytes and zlib.crc32(_read(data, record.offset, record.size)) != record.crc:
                found.append(f"{data}: the image of record {number} is damaged.")
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of the folders in a folder; 0 where it is not there."""
    try:
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return 0
    return sum(size for one in inner for _, size in _files(one))


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of a folder's files; none where it is not there."""
    try:
        return [(entry.name, entry.stat().st_size) for entry in os.scandir(folder) if entry.is_file()]
    except FileNotFoundError:  # deleted by somebody; or not made yet
        return []


def _records(lines: bytes) -> Iterator[Record | None]:
    """Each whole record; None of one that is damaged or struck out."""
    for first in range(0, len(lines) - RECORD_BYTES + 1, RECORD_BYTES):
        yield Record.unpack(lines[first : first + RECORD_BYTES])


def _strike(index: Path, number: int) -> None:
    """Overwrite a record with zeros, so that nobody asks for its image again."""
    with index.open("r+b", buffering=0) as file:
        file.seek(number * RECORD_BYTES)
        _write(file.fileno(), bytes(RECORD_BYTES))


def _read(path: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file, fewer where it ends before."""
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _write(descriptor: int, data: bytes | memoryview) -> None:
    """All of it, though the system may take it in pieces."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
