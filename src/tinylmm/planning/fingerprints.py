"""Identity by content of what lies outside the store: data sources, benchmarks, checkpoint folders. No torch, no Pillow.

Content decides. What was found of a file is cached under its path, size, modification time and inode, so that a plan reads a
file once. Weights and annotations are hashed whole. Of an image of more than 2 * EDGE_BYTES the size and both ends are: the
compressed formats that we read change behind an edit and up to their checksum or end marker, and to read a million files from
end to end just to plan a run would take longer than many a run.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeGuard

from tinylmm.config.spec import EvalSpec, SourceSpec
from tinylmm.data.image_names import is_embedded
from tinylmm.data.records import read_records
from tinylmm.data.sample import Sample, read_samples
from tinylmm.errors import DataError, DiskError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.sampling import sampled
from tinylmm.store.disk import writing
from tinylmm.store.integrity import hash_file, write_atomic
from tinylmm.store.stage import digest

log = logging.getLogger(__name__)

MISSING_SHOWN = 20
EDGE_BYTES = 4096
"""Of a large image, so much of its beginning and of its end is hashed."""
TOLD_BYTES = 1_000_000_000
"""To hash a file of this size takes seconds: it is said in the log."""
CACHED_BYTES = 100_000
"""Hashes of smaller files are not cached: to read them takes no longer than to read the cache."""
_CACHE_FORMAT = 4
_READERS = 8
"""Threads that look images up: on a network's disk it is waiting that takes the time."""
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp4", ".avi", ".webm", ".mkv"}
"""Endings of a benchmark's files that its questions do not depend on."""


def source_fingerprint(root: Path, source: SourceSpec, cache_folder: Path) -> dict[str, Any]:
    """Return {"annotations", "images", "num_images", "missing", "num_missing"} of one source.

    `annotations` and `images` are SHA-256 digests. `missing` holds the first MISSING_SHOWN image paths that name no
    file, `num_missing` is how many there are; both are for the check before a run (a missing image counts as size -1 in
    the digest, so that adding it changes the identity). The hash and the image list are cached in `cache_folder` under
    the annotation file's state, what was read of each image under the image's; images are looked up on disk every time.

    Raises:
        DataError: the annotation file is missing or unreadable; the message says how to get it.
    """
    annotations = root / source.annotations
    cache = _source_cache(annotations, source, cache_folder)
    known = cache.read()
    if known is None:
        known = {"annotations": _content(annotations), "paths": _image_paths(annotations, source)}
        cache.write(known)
    images = Path(os.path.abspath(root / source.images))  # noqa: PTH100 (links are not followed: the path names the cache)
    return {"annotations": known["annotations"], **_listing(images, known["paths"], cache_folder)}


def benchmark_fingerprint(benchmark: Benchmark, spec: EvalSpec, cache_folder: Path) -> dict[str, Any]:
    """Return {"items", "count", "images", "num_images", "missing", "num_missing"} of a benchmark's questions under `spec.root`.

    `items` is the SHA-256 of all questions, `images` that of the sorted image and parquet files that they are about;
    `missing` are the first of those that are not there. What the questions are is cached in `cache_folder` for as
    long as neither a file beside the images nor the benchmark's module changes; images are looked up every time.

    Raises:
        DataError: a file of the benchmark is missing (which, where, how to get it), or a record is broken.
    """
    assert spec.root is not None  # EvalSpec's validator holds this
    root = Path(spec.root).absolute()
    fields = spec.model_dump(mode="json", include={"benchmark", "options", "layout", "limit", "limit_seed"})
    state = {"files": _state_of_files(root), "code": _code(benchmark)}
    cache = _Cache(cache_folder, {**fields, "root": str(root)}, state)
    known = cache.read()
    if known is None:
        items = sampled(benchmark, benchmark.load(root, spec.layout), spec.limit, spec.limit_seed)
        known = {"items": _items_digest(items, root), "count": len(items), "paths": _paths(items, root)}
        cache.write(known)
    return {"items": known["items"], "count": known["count"], **_listing(root, known["paths"], cache_folder)}


def checkpoint_fingerprint(path_or_id: str, cache_folder: Path) -> dict[str, Any]:
    """Return {} for a hub id, which its revision identifies, and {"files": {path: ...}} for an existing local folder.

    Each file counts with its size and its SHA-256. Of two checkpoints joined by `+` (a mixture of features), each counts on
    its own, a hub id by its name.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        parts = path_or_id.split("+")
        contents = [checkpoint_fingerprint(part, cache_folder) for part in parts] if len(parts) > 1 else []
        if not any(contents):
            return {}
        return {"parts": [content or {"id": part} for part, content in zip(parts, contents, strict=True)]}
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            files[relative.as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path, cache_folder)}
    return {"files": files}


def model_fingerprint(path: str, cache_folder: Path) -> dict[str, Any]:
    """Return {"files": {path: SHA-256}} of a trained model's folder."""
    folder = Path(path)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {"files": {file.relative_to(folder).as_posix(): _hash(file, cache_folder) for file in files}}


def _hash(path: Path, cache_folder: Path) -> str:
    """SHA-256 of a file, read once for each state of it."""
    stat = path.stat()
    if stat.st_size < CACHED_BYTES:
        return hash_file(path)
    cache = _Cache(cache_folder, {"file": str(path.absolute())}, {"stat": _state(stat)})
    known = cache.read()
    if known is None:
        if stat.st_size >= TOLD_BYTES:
            log.warning(
                "reading %s (%.1f GB) to tell it from others; the next plan will know it", path, stat.st_size / 1e9
            )
        known = {"sha256": hash_file(path)}
        cache.write(known)
    return str(known["sha256"])


def _state(stat: os.stat_result) -> list[int]:
    """What changes when a file is written or replaced."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


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
            checksum, _, text = self.path.read_bytes().partition(b"\n")
            if checksum.decode() != hashlib.sha256(text).hexdigest():
                return None
            record = json.loads(text)
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("key") != self.key:
            return None
        with contextlib.suppress(OSError):  # of a store that can only be read
            os.utime(self.path)  # it was of use: `store gc` deletes what was not for long
        return dict(record["value"])

    def write(self, value: dict[str, Any]) -> None:
        """Replace the cache file, so that another process never reads half of it.

        Where the store cannot be written there is no cache, and all is read anew each time: planning needs none.
        """
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": self.key, "value": value}).encode()
            write_atomic(self.path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text, durable=False)
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
    return _Cache(folder, where, {"stat": list(map(_state, stats))})


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


def _listing(root: Path, paths: Sequence[str], cache_folder: Path) -> dict[str, Any]:
    """Digest of (path, size, content) of all images, and those that are missing.

    What the paths name is only read where it is a regular file; they are no promise of an image, nor of one below `root`.
    """
    cache = _Cache(cache_folder, {"images": str(root), "of": digest(list(paths))}, {})
    known = cache.read() or {}
    with ThreadPoolExecutor(_READERS) as threads:
        states = list(threads.map(lambda path: _look_up(root, path, known.get(path)), paths, chunksize=256))
    found = dict(zip(paths, states, strict=True))
    if found != known:
        cache.write(found)
    listing = hashlib.sha256()
    missing = [path for path, state in found.items() if state is None]
    for path, state in found.items():
        line = [path, -1, ""] if state is None else [path, state[0], state[3]]
        listing.update(json.dumps(line).encode() + b"\n")
    counts = {"num_images": len(paths), "missing": missing[:MISSING_SHOWN], "num_missing": len(missing)}
    return {"images": listing.hexdigest(), **counts}


def _look_up(root: Path, path: str, known: list[Any] | None) -> list[Any] | None:
    """Size, modification time, inode and content of an image, or None if there is none; read only if it changed."""
    where = f"{root}/{path}"
    try:
        stat = os.stat(where)  # noqa: PTH116 - a million calls, and pathlib's are three times slower
        state = _state(stat)
        if known is not None and known[:3] == state:
            return known
        return [*state, _edges(where, stat) if S_ISREG(stat.st_mode) else ""]
    except (OSError, ValueError):
        return None


def _edges(path: str, stat: os.stat_result) -> str:
    """32 digits of the SHA-256 of a file's first and last EDGE_BYTES, or of all of a small one."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        content = file.read(2 * EDGE_BYTES) if stat.st_size <= 2 * EDGE_BYTES else file.read(EDGE_BYTES)
        if stat.st_size > 2 * EDGE_BYTES:
            file.seek(-EDGE_BYTES, os.SEEK_END)
            content += file.read(EDGE_BYTES)
    return hashlib.sha256(content).hexdigest()[:32]


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
