"""What a store holds and who uses it; deleting what nobody does. No torch here.

Beside stages that is the features of frozen towers and transformed images, kept for as long as a kept stage reads them;
published weights, kept for as long as a model has hard links to them; and the cached fingerprints of files outside the store,
kept for CACHE_DAYS after they last told something. All of these are made again when they are missing.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylmm.errors import DiskError, IntegrityError
from tinylmm.store.claims import Claim, describe, held
from tinylmm.store.disk import FULL, has_no_room
from tinylmm.store.find_model import CONFIG_FILE
from tinylmm.store.integrity import check_files, check_folder, read_manifest
from tinylmm.store.layout import (
    DAMAGED_FOLDER,
    FEATURES_USED_FILE,
    KEY_DIGITS,
    MARKER_FILE,
    PIXELS_USED_FILE,
    SPEC_FILE,
    WORK_FOLDER,
    StoreLayout,
)
from tinylmm.store.pixels import check_shelf, count_images, describe_shelf
from tinylmm.store.runs import read_runs

CACHE_DAYS = 30
"""A cached fingerprint that nobody read for so long is deleted."""
FEATURES = "features"
PIXELS = "pixels"
PUBLISHED = "published"
CACHE = "cache"
IMPORTED = "imported"
"""What `kind` says of rows that are no stages."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFolder:
    """One folder of finished stages, of features, or of the cache; its fields are the JSON of `tinylmm store ls --json`.

    Attributes:
        key: name of the folder.
        kind: of the stage, or `features`, `pixels`, `published`, `imported` or `cache`.
        name, digest, finished (ISO 8601): of its manifest; empty or None where that cannot be read or says nothing of it.
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
class Unused:
    """A folder or file that no run uses: its path below the store, its name or the stage's key, its size in bytes."""

    folder: str
    key: str
    size: int


def list_stored(root: Path) -> list[StoredFolder]:
    """Return one row for each folder of finished stages, oldest first, then features, published weights, and the cache."""
    layout = StoreLayout(root)
    users: dict[str, list[str]] = {}
    for run in read_runs(root):
        for digest in {stage.digest for stage in run.stages}:
            users.setdefault(digest, []).append(run.name)
    rows = [_stored_stage(folder, users) for folder in folders(layout.stages)]
    rows.sort(key=lambda row: (row.finished or "", row.key))
    readers: dict[str, list[str]] = {}
    for stage in (*folders(layout.stages), *folders(layout.work)):
        for key in _caches_of(stage):
            readers.setdefault(key, []).extend(_runs_of(stage, users))
    rows += [_stored_features(folder, readers) for folder in folders(layout.features)]
    rows += [_stored_pixels(folder, readers) for folder in folders(layout.pixels)]
    rows += [_stored_weights(folder) for folder in folders(layout.published)]
    rows += [
        StoredFolder(folder.name, IMPORTED, "", None, _size(folder), None, "complete", ())
        for folder in folders(layout.imported)
    ]
    if layout.cache.is_dir():
        rows.append(StoredFolder(CACHE, CACHE, "fingerprints", None, _size(layout.cache), None, "complete", ()))
    return rows


def collect_garbage(root: Path, keep: set[str], dry_run: bool = True) -> list[Unused]:
    """Delete what no run uses: stages, work folders, features, images, what was set aside, and old imports and fingerprints.

    Kept are the stages of `keep`, those with a live claim, all ancestors of either, and the features and images that any of
    these reads. Published weights go in the call after the one that deletes the last model with links to them. A stage that a
    run picks up while this deletes may be gone when that run reads it; the run then says so.

    Args:
        root: the store.
        keep: digests that runs refer to (`runs.used_digests`).
        dry_run: only say what would be deleted.

    Returns:
        one row for each folder or file deleted, or to delete.

    Raises:
        IntegrityError: spec.json of a kept stage cannot be read, so its parents are unknown; or the list of features that
            it reads.
    """
    layout = StoreLayout(root)
    candidates = [*folders(layout.stages), *folders(layout.work)]
    live = {folder.name for folder in candidates if held(root, folder.name)}
    kept = _with_ancestors({digest[:KEY_DIGITS] for digest in keep} | set(map(_short_digest, live)), candidates)
    unused = [folder for folder in candidates if _short_digest(folder.name) not in kept]
    in_use = {key for folder in candidates if _short_digest(folder.name) in kept for key in _caches_of(folder)}
    caches = (*folders(layout.features), *folders(layout.pixels))
    made = [folder for folder in caches if folder.name not in in_use]
    stages = [_unused(root, folder) for folder in (*unused, *folders(layout.damaged))]
    weights = [folder for folder in folders(layout.published) if not _linked(folder)]
    imported = [folder for folder in folders(layout.imported) if _is_old(folder / CONFIG_FILE)]
    others = [_unused(root, path) for path in (*made, *weights, *imported, *_old_files(layout.cache))]
    if dry_run:
        return stages + others
    deleted = [row for row in stages if _delete(root, root / row.folder, row.key)]
    for row in others:
        discard(root, root / row.folder)
    remove(layout.trash)  # also what a killed deletion left there
    return deleted + others


def discard(root: Path, path: Path) -> None:
    """Delete a folder or file so that nobody ever meets half of it under its own name."""
    trash = StoreLayout(root).trash
    try:
        trash.mkdir(parents=True, exist_ok=True)
        path = path.rename(trash / f"{path.name}-{secrets.token_hex(4)}")
    except OSError as error:
        if error.errno not in FULL:
            raise
        remove(path / MARKER_FILE)  # no room to move it: without its marker it is not used, whole or half
    remove(path)


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
    try:
        owner = claim.try_acquire()
    except (OSError, DiskError) as error:
        if not has_no_room(root):
            raise
        log.info("%s is deleted without a claim: %s", key, error)  # on a full disk nobody else can take one either
        owner = held(root, key)
    if owner is not None:
        log.warning("%s is kept: %s works on it", key, describe(owner))
        return False
    try:
        discard(root, folder)
    finally:
        claim.release()
    return True


def _caches_of(stage: Path) -> list[str]:
    """Names of the folders of features and of transformed images that a stage reads.

    Raises:
        IntegrityError: the stage's list of them cannot be read.
    """
    return [key for file in (FEATURES_USED_FILE, PIXELS_USED_FILE) for key in _listed(stage, file)]


def _listed(stage: Path, file: str) -> list[str]:
    path = stage / file
    try:
        return [str(key) for key in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({error}), so what this stage reads of the store's {path.stem} is unknown. Move {stage} "
            "away and give the command of a run that uses it again."
        ) from error


def _runs_of(stage: Path, users: dict[str, list[str]]) -> list[str]:
    """Names of the runs that use a finished or unfinished stage."""
    short = _short_digest(stage.name)
    return [name for digest, names in users.items() if digest.startswith(short) for name in names]


def _stored_features(folder: Path, readers: dict[str, list[str]]) -> StoredFolder:
    runs = tuple(sorted(set(readers.get(folder.name, ()))))
    try:
        name = f"{read_manifest(folder)['images']} images"
    except (IntegrityError, KeyError):
        return StoredFolder(folder.name, FEATURES, "", None, _size(folder), None, "damaged", runs)
    status: Literal["complete", "damaged"] = "damaged" if check_folder(folder, deep=False) else "complete"
    return StoredFolder(folder.name, FEATURES, name, None, _size(folder), None, status, runs)


def _stored_pixels(folder: Path, readers: dict[str, list[str]]) -> StoredFolder:
    runs = tuple(sorted(set(readers.get(folder.name, ()))))
    name = f"{count_images(folder):,} images{describe_shelf(folder)}"
    status: Literal["complete", "damaged"] = "damaged" if check_shelf(folder, deep=False) else "complete"
    return StoredFolder(folder.name, PIXELS, name, None, _size(folder), None, status, runs)


def _stored_weights(folder: Path) -> StoredFolder:
    try:
        name = f"{read_manifest(folder)['part']} weights"
    except (IntegrityError, KeyError):
        return StoredFolder(folder.name, PUBLISHED, "", None, _size(folder), None, "damaged", ())
    status: Literal["complete", "damaged"] = "damaged" if check_folder(folder, deep=False) else "complete"
    return StoredFolder(folder.name, PUBLISHED, name, None, _size(folder), None, status, ())


def _linked(folder: Path) -> bool:
    """Whether a model has hard links to the folder's files."""
    return any(path.stat().st_nlink > 1 for path in folder.rglob("*") if path.is_file())


def _old_files(cache: Path) -> list[Path]:
    """Files of the cache that nobody read or wrote for CACHE_DAYS."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and _is_old(path))


def _is_old(path: Path) -> bool:
    """Whether a file was last read or written more than CACHE_DAYS ago; who reads one sets its time."""
    return not path.exists() or path.stat().st_mtime < time.time() - CACHE_DAYS * 86400


def _stored_stage(folder: Path, users: dict[str, list[str]]) -> StoredFolder:
    kind, size = folder.name.rpartition("-")[0], _size(folder)
    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        return StoredFolder(folder.name, kind, "", None, size, None, "damaged", ())
    status: Literal["complete", "unfinished", "damaged"] = "complete"
    if check_folder(folder, deep=False):
        only_unmarked = not (folder / MARKER_FILE).exists() and not check_files(folder, deep=False)
        status = "unfinished" if only_unmarked else "damaged"
    digest, runs = manifest.get("digest"), tuple(users.get(manifest.get("digest", ""), ()))
    name, finished = manifest.get("name") or "", manifest.get("finished")
    return StoredFolder(folder.name, manifest.get("kind") or kind, name, digest, size, finished, status, runs)


def _unused(root: Path, path: Path) -> Unused:
    where = path.relative_to(root)
    key = path.name.rpartition("-")[0] if where.parts[0] == DAMAGED_FOLDER else path.name
    return Unused(where.as_posix(), key, _size(path))


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


def _size(path: Path) -> int:
    """Of a file, or of all files below a folder, bytes."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
