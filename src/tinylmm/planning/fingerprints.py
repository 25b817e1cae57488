"""Identity by content of what lies outside the store: data sources and local checkpoint folders. No torch, no Pillow.

A source's identity is the SHA-256 of its annotation file and of the sorted listing (path, size) of the images it names.
Image bytes are not hashed: to read a million files just to plan a run would take longer than many a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from tinylmm.config.spec import SourceSpec
from tinylmm.data.image_names import is_embedded
from tinylmm.data.sample import Sample, read_records, read_samples
from tinylmm.errors import DataError
from tinylmm.store.stage import digest

MISSING_SHOWN = 20
STAT_LIMIT = 200_000
"""Of a source with more images than this, sizes are cached too, for as long as its annotation file is unchanged."""
HASHED_BYTES = 10_000_000
"""Files of a checkpoint below this size are hashed; larger ones (weights) are identified by name and size."""
_CACHE_FORMAT = 1


def source_fingerprint(root: Path, source: SourceSpec, cache_folder: Path) -> dict[str, Any]:
    """Return {"annotations", "images", "num_images", "missing", "num_missing"} of one source.

    `annotations` and `images` are SHA-256 digests. `missing` holds the first MISSING_SHOWN image paths that name no
    file, `num_missing` is how many there are; both are for the check before a run (a missing image counts as size -1 in
    the digest, so that adding it changes the identity). The hash and the image list are cached in `cache_folder` under
    the annotation file's path, size and modification time. Images are looked up on disk every time up to STAT_LIMIT of
    them, beyond that only when the annotation file has changed: delete `cache_folder` after changing images of such a
    source in place.

    Raises:
        DataError: the annotation file is missing or unreadable; the message says how to get it.
    """
    annotations = root / source.annotations
    cache = _Cache.of(annotations, cache_folder, source)
    known = cache.read() or {"annotations": _content(annotations), "paths": _image_paths(annotations, source)}
    images = root / source.images
    if len(known["paths"]) <= STAT_LIMIT or "listing" not in known:
        known["listing"] = _listing(images, known["paths"])
        cache.write(known)
    return {"annotations": known["annotations"], "num_images": len(known["paths"]), **known["listing"]}


def checkpoint_fingerprint(path_or_id: str) -> dict[str, Any]:
    """Return {} for a hub id, which its revision identifies, and {"files": {path: ...}} for an existing local folder.

    Each file counts with its size, and with its SHA-256 where it is `config.json` or has less than HASHED_BYTES. Of two
    checkpoints joined by `+` (a mixture of features), each counts on its own, a hub id by its name.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        parts = path_or_id.split("+")
        contents = [checkpoint_fingerprint(part) for part in parts] if len(parts) > 1 else []
        if not any(contents):
            return {}
        return {"parts": [content or {"id": part} for part, content in zip(parts, contents, strict=True)]}
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        entry: dict[str, Any] = {"size": path.stat().st_size}
        if path.name == "config.json" or entry["size"] < HASHED_BYTES:
            entry["sha256"] = _sha256(path)
        files[relative.as_posix()] = entry
    return {"files": files}


def model_fingerprint(path: str, cache_folder: Path) -> dict[str, Any]:
    """Return {"files": {path: SHA-256}} of a trained model's folder: two of them differ in nothing but their weights' bytes.

    Hashes are cached in `cache_folder` under each file's path, size and modification time.
    """
    folder = Path(path)
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = file.stat()
        key = {
            "path": str(file.absolute()),
            "format": _CACHE_FORMAT,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        cache = _Cache(cache_folder / f"{digest({'model': key['path']})[:32]}.json", key)
        known = cache.read()
        if known is None:
            known = {"sha256": _sha256(file)}
            if stat.st_size > HASHED_BYTES:
                cache.write(known)
        files[file.relative_to(folder).as_posix()] = known["sha256"]
    return {"files": files}


class _Cache:
    """One JSON file for one state of one annotation file."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        self.key = key

    @classmethod
    def of(cls, annotations: Path, folder: Path, source: SourceSpec) -> _Cache:
        try:
            stats = [path.stat() for path in _files(annotations)]
        except OSError as error:
            hint = (
                source.how_to_get or "Put the file there, or correct the source's `annotations` or the data's `root`."
            )
            raise DataError(f"annotation file {annotations}: not found ({error.strerror}). {hint}") from error
        where = {"path": str(annotations.absolute()), "images": source.images, "limit": source.limit}
        where |= {} if source.format == "llava" else {"layout": source.format}
        state = {
            "format": _CACHE_FORMAT,
            "size": sum(stat.st_size for stat in stats),
            "mtime_ns": max(stat.st_mtime_ns for stat in stats),
        }
        return cls(folder / f"{digest(where)[:32]}.json", where | state)

    def read(self) -> dict[str, Any] | None:
        """What was cached for the file as it is now; a damaged or foreign cache file counts as none."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record["value"] if isinstance(record, dict) and record.get("key") == self.key else None

    def write(self, value: dict[str, Any]) -> None:
        """Replace the cache file in one step, so that another process never reads half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"key": self.key, "value": value}, file)
        Path(file.name).replace(self.path)


def _files(annotations: Path) -> list[Path]:
    """The annotation file, or the parquet files of a folder."""
    if not annotations.is_dir():
        return [annotations]
    from tinylmm.data.parquet import parquet_files

    return parquet_files(annotations)


def _content(annotations: Path) -> str:
    """SHA-256 of the annotation file; of a folder's parquet files, that of their hashes in order."""
    if not annotations.is_dir():
        return _sha256(annotations)
    return digest([_sha256(path) for path in _files(annotations)])


def _image_paths(annotations: Path, source: SourceSpec) -> list[str]:
    """Every image path that the first `limit` records name, sorted, each once. Faults are `prepare`'s to report."""
    paths: set[str] = set()
    if source.format in ("llava", "questions"):
        for record in islice(read_records(annotations), source.limit):
            named = record.get("image") if isinstance(record, dict) else None
            paths.update(filter(_is_path, named if isinstance(named, list) else [named]))
    else:
        for sample in islice(read_samples(annotations, source.format), source.limit):
            paths.update(filter(_is_path, sample.images) if isinstance(sample, Sample) else ())
    return sorted(paths)


def _is_path(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and not is_embedded(name) and not name.startswith("data:")


def _listing(images: Path, paths: Iterable[str]) -> dict[str, Any]:
    """Digest of (path, size) of all images, and those that are missing. Nothing is opened, whatever the paths name."""
    state = hashlib.sha256()
    missing = []
    for path in paths:
        try:
            size = os.stat(images / path).st_size  # noqa: PTH116 - a million calls, and pathlib's are three times slower
        except (OSError, ValueError):
            size = -1
            missing.append(path)
        state.update(json.dumps([path, size]).encode() + b"\n")
    return {"images": state.hexdigest(), "missing": missing[:MISSING_SHOWN], "num_missing": len(missing)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
