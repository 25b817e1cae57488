"""What a store holds and who uses it; deleting what nobody does. No torch here."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylmm.errors import IntegrityError
from tinylmm.store.claims import Claim, describe, held
from tinylmm.store.integrity import check_files, check_folder, read_manifest
from tinylmm.store.layout import DAMAGED_FOLDER, KEY_DIGITS, MARKER_FILE, SPEC_FILE, WORK_FOLDER, StoreLayout
from tinylmm.store.runs import read_runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredStage:
    """One folder of finished stages; the fields are the JSON of `tinylmm store ls --json`.

    Attributes:
        key: name of the folder.
        name, digest, finished (ISO 8601): of its manifest; empty or None where that cannot be read.
        size: of all its files, bytes.
        status: found without reading the files.
        runs: names of the runs that use it.
    """

    key: str
    kind: str
    name: str
    digest: str | None
    size: int
    finished: str | None
    status: Literal["complete", "unfinished", "damaged"]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class UnusedFolder:
    """A folder that no run uses: its path below the store, the stage's key, the size of all its files in bytes."""

    folder: str
    key: str
    size: int


def list_stages(root: Path) -> list[StoredStage]:
    """Return one row for each folder of finished stages, oldest first."""
    users: dict[str, list[str]] = {}
    for run in read_runs(root):
        for digest in {stage.digest for stage in run.stages}:
            users.setdefault(digest, []).append(run.name)
    rows = [_stored_stage(folder, users) for folder in folders(StoreLayout(root).stages)]
    return sorted(rows, key=lambda row: (row.finished or "", row.key))


def collect_garbage(root: Path, keep: set[str], dry_run: bool = True) -> list[UnusedFolder]:
    """Delete what no run uses: stages, work folders, and everything that was set aside as damaged.

    Kept are the stages of `keep`, those with a live claim, and all ancestors of either. A stage that a run picks up
    while this deletes may be gone when that run reads it; the run then says so.

    Args:
        root: the store.
        keep: digests that runs refer to (`runs.used_digests`).
        dry_run: only say what would be deleted.

    Returns:
        one row for each folder deleted, or to delete.

    Raises:
        IntegrityError: spec.json of a kept stage cannot be read, so its parents are unknown.
    """
    layout = StoreLayout(root)
    candidates = [*folders(layout.stages), *folders(layout.work)]
    live = {folder.name for folder in candidates if held(root, folder.name)}
    kept = _with_ancestors({digest[:KEY_DIGITS] for digest in keep} | set(map(_short_digest, live)), candidates)
    unused = [folder for folder in candidates if _short_digest(folder.name) not in kept]
    rows = [_unused_folder(root, folder) for folder in (*unused, *folders(layout.damaged))]
    if dry_run:
        return rows
    deleted = [row for row in rows if _delete(root, root / row.folder, row.key)]
    remove(layout.trash)  # also what a killed deletion left there
    return deleted


def discard(root: Path, folder: Path) -> None:
    """Delete a folder so that nobody ever meets half of it under its own name."""
    trash = StoreLayout(root).trash
    trash.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder.rename(trash / f"{folder.name}-{secrets.token_hex(4)}"))


def remove(path: Path) -> None:
    """Delete a file, or a folder with all it holds; nothing happens if there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folders(parent: Path) -> list[Path]:
    """Return the folders directly in `parent`, sorted; none if it does not exist."""
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _delete(root: Path, folder: Path, key: str) -> bool:
    claim = Claim(root, key)
    if (owner := claim.try_acquire()) is not None:
        log.warning("%s is kept: %s works on it", key, describe(owner))
        return False
    try:
        discard(root, folder)
    finally:
        claim.release()
    return True


def _stored_stage(folder: Path, users: dict[str, list[str]]) -> StoredStage:
    kind, size = folder.name.rpartition("-")[0], _size(folder)
    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        return StoredStage(folder.name, kind, "", None, size, None, "damaged", ())
    status: Literal["complete", "unfinished", "damaged"] = "complete"
    if check_folder(folder, deep=False):
        only_unmarked = not (folder / MARKER_FILE).exists() and not check_files(folder, deep=False)
        status = "unfinished" if only_unmarked else "damaged"
    digest, runs = manifest.get("digest"), tuple(users.get(manifest.get("digest", ""), ()))
    name, finished = manifest.get("name") or "", manifest.get("finished")
    return StoredStage(folder.name, manifest.get("kind") or kind, name, digest, size, finished, status, runs)


def _unused_folder(root: Path, folder: Path) -> UnusedFolder:
    where = folder.relative_to(root)
    key = folder.name.rpartition("-")[0] if where.parts[0] == DAMAGED_FOLDER else folder.name
    return UnusedFolder(where.as_posix(), key, _size(folder))


def _with_ancestors(wanted: set[str], folders: list[Path]) -> set[str]:
    """Return the first 16 digits of `wanted` and of all their ancestors; stages that are not there end a line."""
    by_digest: dict[str, list[Path]] = {}
    for folder in folders:
        by_digest.setdefault(_short_digest(folder.name), []).append(folder)
    kept: set[str] = set()
    waiting = set(wanted)
    while waiting:
        short = waiting.pop()
        kept.add(short)
        for folder in by_digest.get(short, []):
            waiting |= _parents(folder) - kept
    return kept


def _parents(folder: Path) -> set[str]:
    path = folder / SPEC_FILE
    if folder.parent.name == WORK_FOLDER and not path.exists():
        return set()  # begun this moment: its run's record names the parents
    try:
        return {digest[:KEY_DIGITS] for digest in json.loads(path.read_text(encoding="utf-8"))["parents"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so what this stage was made from is unknown and "
            f"nothing is deleted. Give the command of a run that uses it again, or move {folder} away."
        ) from error


def _short_digest(key: str) -> str:
    return key.rpartition("-")[2]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
