"""Folders that prove their own content: SHA-256 manifests, a completion marker, and writes that survive a crash.

Stages in the store and training checkpoints are both such folders: `write_manifest`, a rename into place, then
`mark_complete` as the very last write. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tinylmm.errors import IntegrityError
from tinylmm.stop import require_claim
from tinylmm.store.disk import writing
from tinylmm.store.layout import MANIFEST_FILE, MARKER_FILE, OUTPUT_FOLDER

HASH_THREADS = min(4, os.cpu_count() or 1)
"""hashlib lets go of the interpreter lock, so files are hashed side by side,"""
WORTH_THREADS = 1 << 24
"""where they have so many bytes together: hashing fewer is done before threads are started."""

Item = TypeVar("Item")
Result = TypeVar("Result")
FileRecord = dict[str, Any]
"""{"sha256": 64 hexadecimal digits, "size": bytes}"""


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file so that every reader, also after a kill, finds the old file or the new one, never a part.

    Its permissions are those that the umask gives any new file, so colleagues can read what they may read elsewhere.

    Args:
        path: the file; its folder exists.
        content: text is written as UTF-8.
        durable: whether the file is on the disk when this returns. Without it a power cut may lose the new content (a
            cache can be made again), and writing many small files is faster.

    Raises:
        DiskError: the disk is full or read-only, or the folder somebody else's; `path` is as it was.
        ClaimLostError: the stage at hand is another process's by now; `path` is as it was.
    """
    require_claim()
    payload = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with writing(path, len(payload)):
            with temporary.open("xb") as file:
                file.write(payload)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:  # also a signal
        with contextlib.suppress(OSError):  # a disk that refused the file refuses this too; the error above says why
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the permissions that the umask gives a new one.

    Libraries that write weights by way of a temporary file leave them readable by their owner alone, and a shared store could
    then not be shared. A file that is another user's, linked from a stage of theirs, stays as it is.
    """
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != usual:
            path.chmod(usual)


def sync_path(path: Path) -> None:
    """Flush one file, or one directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path, skip: Collection[str] = ()) -> None:
    """Flush every file and directory of `folder` to disk, innermost directories first.

    Args:
        folder: the folder to flush.
        skip: names directly in `folder` to leave out.

    Raises:
        IntegrityError: the folder holds something else than regular files.
    """
    directories = [folder]
    for path in _entries(folder, skip):
        if path.is_dir():
            directories.append(path)
        else:
            sync_path(path)
    for directory in reversed(directories):
        sync_path(directory)


def hash_folder(
    folder: Path, known: dict[str, FileRecord] | None = None, skip: Collection[str] = ()
) -> dict[str, FileRecord]:
    """Return {relative POSIX path: {"sha256", "size"}} of all files in `folder`, sorted by path.

    Args:
        folder: the folder to read.
        known: records computed while the files were written; taken over unread where the size agrees.
        skip: names directly in `folder` to leave out.

    Raises:
        IntegrityError: the folder holds something else than regular files (a link could change behind the manifest).
    """
    names = sorted(path.relative_to(folder).as_posix() for path in _entries(folder, skip) if path.is_file())

    def record(name: str) -> FileRecord:
        size = (folder / name).stat().st_size
        if known and name in known and known[name]["size"] == size:
            return {"sha256": known[name]["sha256"], "size": size}
        return {"sha256": hash_file(folder / name), "size": size}

    records = _mapped(record, names, sum((folder / name).stat().st_size for name in names))
    return dict(zip(names, records, strict=True))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    record: dict[str, Any],
    known: dict[str, FileRecord] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Flush `folder` to disk and write its manifest.json: `record` plus "files" for everything there.

    Args:
        folder: the folder to describe; an older manifest and marker in it are replaced and removed.
        record: plain JSON; the key "files" is ours.
        known: as in `hash_folder`.
        skip: names directly in `folder` that the manifest does not cover.

    Raises:
        IntegrityError: the folder holds something else than regular files.
        DiskError: the disk is full.
    """
    (folder / MARKER_FILE).unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a `write_atomic` that was killed
        leftover.unlink()
    follow_umask(folder)
    skip = {*skip, MANIFEST_FILE}
    sync_folder(folder, skip)
    files = hash_folder(folder, known, skip)
    write_atomic(folder / MANIFEST_FILE, json.dumps({**record, "files": files}, indent=1, allow_nan=False))


def mark_complete(folder: Path) -> None:
    """Write the marker COMPLETE, the SHA-256 of manifest.json. From here on the folder counts."""
    write_atomic(folder / MARKER_FILE, hash_file(folder / MANIFEST_FILE) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json of `folder`.

    Raises:
        IntegrityError: it is missing, or is no manifest.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        records = manifest["files"].values()
        if not all(isinstance(record["sha256"], str) and isinstance(record["size"], int) for record in records):
            raise ValueError("a file's record lacks sha256 or size")
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not a manifest ({type(error).__name__}: {error}).") from error
    return manifest


def check_folder(folder: Path, deep: bool = True) -> list[str]:
    """Return what is wrong with a completed folder, one sentence a finding, each naming its file; empty if all is well.

    Shallow: marker, manifest, presence and size of each file. Deep: SHA-256 of each file too, and files in output/ that
    the manifest does not know.
    """
    if not folder.is_dir():
        return [f"{folder} is missing."]
    marker = folder / MARKER_FILE
    if not marker.is_file():
        return [f"{marker} is missing: the folder was not finished."]
    if not (folder / MANIFEST_FILE).is_file():
        return [f"{folder / MANIFEST_FILE} is missing."]
    found, said = hash_file(folder / MANIFEST_FILE), marker.read_bytes().strip().decode(errors="replace")
    if found != said:
        return [f"{folder / MANIFEST_FILE} has SHA-256 {found[:16]}…, its marker {MARKER_FILE} says {said[:16]}…."]
    return check_files(folder, deep) + (extra_files(folder) if deep else [])


def check_files(folder: Path, deep: bool = True) -> list[str]:
    """Return how the files of `folder` differ from its manifest.json, marked or not; one sentence a file."""
    try:
        files = read_manifest(folder)["files"]
    except IntegrityError as error:
        return [str(error)]
    size = sum(record["size"] for record in files.values()) if deep else 0
    findings = _mapped(lambda item: _check_file(folder / item[0], item[1], deep), list(files.items()), size)
    return [finding for finding in findings if finding]


def _mapped(work: Callable[[Item], Result], items: Sequence[Item], size: int) -> list[Result]:
    """What `work` makes of each item, side by side if that is worth it for so many bytes."""
    if size < WORTH_THREADS:
        return list(map(work, items))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(work, items))


def extra_files(folder: Path) -> list[str]:
    """Return one sentence for each file in output/ that manifest.json does not know."""
    known = read_manifest(folder)["files"]
    names = sorted(
        path.relative_to(folder).as_posix() for path in (folder / OUTPUT_FOLDER).rglob("*") if not path.is_dir()
    )
    return [f"{folder / name} is not in {MANIFEST_FILE}: it was added later." for name in names if name not in known]


def _check_file(path: Path, record: FileRecord, deep: bool) -> str | None:
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return f"{path} is not a regular file any more."
        size = path.stat().st_size
        if size != record["size"]:
            return f"{path} has {size} bytes, {MANIFEST_FILE} says {record['size']}."
        if deep and (found := hash_file(path)) != record["sha256"]:
            return f"{path} has SHA-256 {found[:16]}…, {MANIFEST_FILE} says {record['sha256'][:16]}…."
    except FileNotFoundError:
        return f"{path} is missing."
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    return None


def _entries(folder: Path, skip: Collection[str]) -> Iterator[Path]:
    """Yield every regular file and directory below `folder`, a directory before what it holds."""
    for root, directories, files in os.walk(folder):
        here = Path(root)
        if here == folder:
            directories[:] = [name for name in directories if name not in skip]
            files = [name for name in files if name not in skip]
        for path in (here / name for name in (*files, *directories)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise IntegrityError(
                    f"{path} is not a regular file. Only regular files can be kept; copy what it stands for."
                )
            yield path
