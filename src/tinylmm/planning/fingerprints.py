"""Identity by content of what lies outside the store: data sources, benchmarks, checkpoint folders. No torch, no Pillow.

A source's identity is the SHA-256 of its annotation file and of the sorted listing (path, size) of the images it names.
Image bytes are not hashed: to read a million files just to plan a run would take longer than many a run.
A benchmark's is made of the questions as the benchmark reads them (prompts, references, which images), not of its files:
the same questions in another folder or in files of another kind are the same evaluation.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from tinylmm.config.spec import EvalSpec, SourceSpec
from tinylmm.data.image_names import is_embedded
from tinylmm.data.sample import Sample, read_records, read_samples
from tinylmm.errors import DataError, DiskError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.store.disk import writing
from tinylmm.store.integrity import hash_file, write_atomic
from tinylmm.store.stage import digest

log = logging.getLogger(__name__)

MISSING_SHOWN = 20
STAT_LIMIT = 200_000
"""Of a source with more images than this, sizes are cached too, for as long as its annotation file is unchanged."""
HASHED_BYTES = 10_000_000
"""Files of a checkpoint below this size are hashed; larger ones (weights) are identified by name and size."""
_CACHE_FORMAT = 2
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp4", ".avi", ".webm", ".mkv"}
"""Endings of a benchmark's files that its questions do not depend on."""


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
    cache = _source_cache(annotations, source, cache_folder)
    known = cache.read() or {"annotations": _content(annotations), "paths": _image_paths(annotations, source)}
    images = root / source.images
    if len(known["paths"]) <= STAT_LIMIT or "listing" not in known:
        known["listing"] = _listing(images, known["paths"])
        cache.write(known)
    return {"annotations": known["annotations"], **known["listing"]}


def benchmark_fingerprint(benchmark: Benchmark, spec: EvalSpec, cache_folder: Path) -> dict[str, Any]:
    """Return {"items", "count", "images", "num_images", "missing", "num_missing"} of a benchmark's questions under `spec.root`.

    `items` is the SHA-256 of all questions, `images` that of the sorted (path, size) of the image and parquet files that
    they are about; `missing` are the first of those that are not there. What the questions are is cached in `cache_folder`
    for as long as neither a file beside the images nor the benchmark's module changes; images are looked up every time.

    Raises:
        DataError: a file of the benchmark is missing (which, where, how to get it), or a record is broken.
    """
    assert spec.root is not None  # EvalSpec's validator holds this
    root = Path(spec.root).absolute()
    fields = spec.model_dump(mode="json", include={"benchmark", "options", "layout", "limit"})
    state = {"files": _state_of_files(root), "code": _code(benchmark)}
    cache = _Cache(cache_folder, {**fields, "root": str(root)}, state)
    known = cache.read()
    if known is None:
        items = benchmark.load(root, spec.layout)[: spec.limit]
        known = {"items": _items_digest(items, root), "count": len(items), "paths": _paths(items, root)}
        cache.write(known)
    return {"items": known["items"], "count": known["count"], **_listing(root, known["paths"])}


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
            entry["sha256"] = hash_file(path)
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
        state = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        cache = _Cache(cache_folder, {"model": str(file.absolute())}, state)
        known = cache.read()
        if known is None:
            known = {"sha256": hash_file(file)}
            if stat.st_size > HASHED_BYTES:
                cache.write(known)
        files[file.relative_to(folder).as_posix()] = known["sha256"]
    return {"files": files}


class _Cache:
    """One JSON file for one state of what lies on disk.

    Args:
        folder: of all cache files.
        where: what is cached; names the file.
        state: how it was found (sizes, times): what was cached for another state counts as none.
    """

    def __init__(self, folder: Path, where: dict[str, Any], state: dict[str, Any]) -> None:
        self.path = folder / f"{digest(where)[:32]}.json"
        self.key = {"format": _CACHE_FORMAT, **where, **state}

    def read(self) -> dict[str, Any] | None:
        """What was cached for the state as it is now; a damaged or foreign cache file counts as none."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("key") != self.key:
            return None
        with contextlib.suppress(OSError):  # of a store that can only be read
            os.utime(self.path)  # it was of use: `store gc` deletes what was not for long
        return record["value"]

    def write(self, value: dict[str, Any]) -> None:
        """Replace the cache file, so that another process never reads half of it.

        Where the store cannot be written there is no cache, and all is read anew each time: planning needs none.
        """
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps({"key": self.key, "value": value}), durable=False)
        except DiskError as error:
            log.info("not cached: %s", error)


# ---------------------------------------------------------------------------------------------------- sources


def _source_cache(annotations: Path, source: SourceSpec, folder: Path) -> _Cache:
    try:
        stats = [path.stat() for path in _files(annotations)]
    except OSError as error:
        hint = source.how_to_get or "Put the file there, or correct the source's `annotations` or the data's `root`."
        raise DataError(f"annotation file {annotations}: not found ({error.strerror}). {hint}") from error
    where = {"path": str(annotations.absolute()), "images": source.images, "limit": source.limit}
    where |= {} if source.format == "llava" else {"layout": source.format}
    state = {"size": sum(stat.st_size for stat in stats), "mtime_ns": max(stat.st_mtime_ns for stat in stats)}
    return _Cache(folder, where, state)


def _files(annotations: Path) -> list[Path]:
    """The annotation file, or the parquet files of a folder."""
    if not annotations.is_dir():
        return [annotations]
    from tinylmm.data.parquet import parquet_files

    return parquet_files(annotations)


def _content(annotations: Path) -> str:
    """SHA-256 of the annotation file; of a folder's parquet files, that of their hashes in order."""
    if not annotations.is_dir():
        return hash_file(annotations)
    return digest([hash_file(path) for path in _files(annotations)])


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


def _listing(root: Path, paths: Sequence[str]) -> dict[str, Any]:
    """Digest of (path, size) of all images, and those that are missing. Nothing is opened, whatever the paths name."""
    state = hashlib.sha256()
    missing = []
    for path in paths:
        try:
            size = os.stat(root / path).st_size  # noqa: PTH116 - a million calls, and pathlib's are three times slower
        except (OSError, ValueError):
            size = -1
            missing.append(path)
        state.update(json.dumps([path, size]).encode() + b"\n")
    counts = {"num_images": len(paths), "missing": missing[:MISSING_SHOWN], "num_missing": len(missing)}
    return {"images": state.hexdigest(), **counts}


# ---------------------------------------------------------------------------------------------------- benchmarks


def _code(benchmark: Benchmark) -> str:
    """SHA-256 of the benchmark's module: another version of it may ask other questions about the same files."""
    path = inspect.getsourcefile(type(benchmark))
    return "" if path is None else hash_file(Path(path))


def _items_digest(items: Sequence[Item], root: Path) -> str:
    state = hashlib.sha256()
    for item in items:
        images = [
            {
                "path": _below(ref.path, root),
                "row": ref.row,
                "column": ref.column,
                "data": None if ref.data is None else hashlib.sha256(ref.data).hexdigest(),
            }
            for ref in item.images
        ]
        row = [item.item_id, item.question_id, item.prompt, images, item.category, item.reference, item.options]
        state.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
    return state.hexdigest()


def _plain(value: Any) -> Any:
    """References are of each benchmark's own kind; what JSON does not know is written as its fields, or its repr."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value.name if isinstance(value, Path) else repr(value)


def _paths(items: Sequence[Item], root: Path) -> list[str]:
    """Files that hold the items' images, sorted, each once."""
    return sorted({_below(ref.path, root) for item in items for ref in item.images if ref.data is None})


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _state_of_files(root: Path) -> str:
    """Digest of (path, size, time) of all files below `root` that are no images."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if Path(name).suffix.lower() not in _IMAGES:
                path = Path(folder) / name
                try:
                    stat = path.stat()
                except OSError:  # a link that leads nowhere
                    found.append((str(path), -1, 0))
                    continue
                found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()
