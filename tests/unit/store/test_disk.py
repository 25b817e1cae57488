"""What a disk refuses is recognised wherever in an error it stands."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tinylmm.errors import DiskError
from tinylmm.store.disk import refusal, reserve, writing


def caused(error: Exception, cause: Exception, explicit: bool) -> Exception:
    """The error as it is raised from its cause, or while that is dealt with."""
    try:
        try:
            raise cause
        except type(cause):
            if explicit:
                raise error from cause
            raise error  # noqa: B904
    except type(error) as raised:
        return raised


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/file")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        caused(ValueError("cannot be saved"), FULL, explicit=True),
        caused(ValueError("cannot be saved"), FULL, explicit=False),
        caused(KeyError("x"), caused(ValueError("y"), FULL, explicit=False), explicit=True),
    ],
    ids=["itself", "quota", "a library's words", "cause", "context", "deep"],
)
def test_a_full_disk_is_found_behind_any_error(error: Exception, tmp_path: Path) -> None:
    said = refusal(error, tmp_path)
    assert said is not None and said.startswith("The disk is full: ") and "\n" not in said


def test_another_error_is_none_of_the_disks(tmp_path: Path) -> None:
    assert refusal(ValueError("x"), tmp_path) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "not found", "x"), tmp_path) is None
    dealt_with = caused(ValueError("a bug"), PermissionError(errno.EACCES, "denied", "x"), explicit=False)
    assert refusal(dealt_with, tmp_path) is None


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "its disk is read-only"), (errno.EACCES, "permission denied")]
)
def test_what_may_not_be_written_is_named(number: int, words: str, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "file"))
    said = refusal(error, Path("elsewhere"))
    assert said is not None and str(tmp_path / "file") in said and words in said
    with pytest.raises(DiskError, match=words), writing(tmp_path / "file"):
        raise error


def test_a_reserved_file_has_room_of_its_own(tmp_path: Path) -> None:
    reserve(tmp_path / "file", 100_000)
    status = (tmp_path / "file").stat()
    assert status.st_size == 100_000 and status.st_blocks * 512 >= 100_000
    reserve(tmp_path / "empty", 0)
    assert (tmp_path / "empty").stat().st_size == 0
