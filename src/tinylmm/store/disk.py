"""What a disk refuses, said in one sentence, and room that is taken before it is written to. No torch here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylmm.errors import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
FULL_WORDS = ("No space left on device", "Disk quota exceeded")
"""How libraries that keep no error number say it (safetensors, torch, a rank's traceback)."""
NEXT_TO_NOTHING = 1 << 20
"""Bytes: with less than this, what failed without a word failed for want of room."""


@contextmanager
def writing(path: Path, needs: int = 0) -> Iterator[None]:
    """Turn what the disk refuses while the block writes `path`, which takes so many bytes, into one sentence.

    Raises:
        DiskError: the disk is full or read-only, or the folder belongs to somebody else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, *FORBIDDEN):
            raise DiskError(_sentence(path, error.errno, needs)) from error
        raise


def refusal(error: BaseException, folder: Path) -> str | None:
    """One sentence if something that a disk refused is behind an error; None if it is something else.

    Args:
        folder: on the disk that was written to, where the error does not say.
    """
    one: BaseException | None = error
    while one is not None:
        number = one.errno if isinstance(one, OSError) else None
        named = Path(os.fsdecode(one.filename)) if isinstance(one, OSError) and one.filename else folder
        if number in FULL or any(words in str(one) for words in FULL_WORDS):
            return _sentence(named, errno.ENOSPC)
        if number in FORBIDDEN and one is error:  # deeper down it may have been dealt with
            return _sentence(named, number)
        one = one.__cause__ or one.__context__
    return None


def has_no_room(folder: Path) -> bool:
    """Whether next to nothing more can be written there."""
    free, files = _free(folder)
    return free < NEXT_TO_NOTHING or files == 0


def reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes that are all its own: a mapped file without them dies of SIGBUS on a full disk.

    Raises:
        DiskError: there is not that much room; nothing is left behind.
    """
    try:
        with writing(path, size), path.open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except DiskError:
        path.unlink(missing_ok=True)
        raise


def _sentence(path: Path, number: int | None, needs: int = 0) -> str:
    if number in FULL:
        free, files = _free(path)
        wanted = f"writing {path} needs {needs:,} bytes" if needs else f"{path} cannot be written"
        room = f"its disk has {free:,} free" if files else "its disk has no room for one more file name (inode)"
        return (
            f"The disk is full: {wanted}, {room} (or a quota is used up). Free some space (`tinylmm store gc` lists what "
            "no run uses) and give the same command again."
        )
    what = (
        "cannot be written: its disk is read-only" if number == errno.EROFS else "may not be opened: permission denied"
    )
    return f"{path} {what}. Name another folder; for the store, with store=PATH or TINYLMM_STORE."


def _free(path: Path) -> tuple[int, int]:
    """Free bytes, and free file names; -1 where the file system has no such limit (btrfs)."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else -1
