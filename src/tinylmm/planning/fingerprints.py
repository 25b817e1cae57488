"""Identity by content of what lies outside the store: data sources, benchmarks, checkpoint folders. No torch, no Pillow.

Content decides. What was found of a file is cached under its path, size, modification time and inode, so that a plan reads a
file once. Weights and annotations are hashed whole, of images what `planning/listing.py` says.
A benchmark's is made of the questions as the benchmark reads them (prompts, references, which images), not of its files:
the same questions in another folder or in files of another kind are the same evaluation.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from tinylmm.config.spec import EvalSpec, SourceSpec
from tinylmm.data.image_names import VIDEO, is_embedded, video_path
from tinylmm.data.records import read_records
from tinylmm.data.sample import Sample, read_samples
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.benchmarks.spreadsheet import TABLE
from tinylmm.evaluation.sampling import sampled
from tinylmm.planning.cache import Cache
from tinylmm.planning.listing import Names, image_listing
from tinylmm.store.integrity import hash_file
from tinylmm.store.stage import digest

log = logging.getLogger(__name__)

TOLD_BYTES = 1_000_000_000
"""To hash a file of this size takes seconds: it is said in the log."""
CACHED_BYTES = 100_000
"""Hashes of smaller files are not cached: to read them takes no longer than to read the cache."""
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp4", ".avi", ".webm", ".mkv"}
"""Endings of a benchmark's files that its questions do not depend on."""


def source_fingerprint(root: Path, source: SourceSpec, cache_folder: Path) -> dict[str, Any]:
    """Return {"annotations", "images", "num_images", "missing", "num_missing", "videos"} of one source.

    `annotations` and `images` are SHA-256 digests. `missing` holds the first MISSING_SHOWN image paths that name no
    file, `num_missing` is how many there are; both are for the check before a run (a missing image counts as size -1 in
    the digest, so that adding it changes the identity). Videos count as images; `videos` is whether there are any. The
    hash and the image list are cached in `cache_folder` under the annotation file's state, what was read of each image
    under the image's; images are looked up on disk every time.

    Raises:
        DataError: the annotation file is missing or unreadable; the message says how to get it.
    """
    annotations = root / source.annotations
    cache = _source_cache(annotations, source, cache_folder)
    known = cache.read()
    if known is None or "videos" not in known.value:  # older versions knew of none
        paths = _Paths(_image_paths(annotations, source))
        names = Names.of(paths)
        value = {"annotations": _content(annotations), "videos": paths.videos}
        cache.write(value, text=names.text, ends=names.ends)
    else:
        value, names = known.value, Names(known.arrays["text"], known.arrays["ends"])
    images = Path(os.path.abspath(root / source.images))  # noqa: PTH100 (links are not followed: the path names the cache)
    return {**value, **image_listing(images, names, cache_folder)}


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
    cache = Cache(cache_folder, {**fields, "root": str(root)}, state)
    known = cache.read()
    if known is None:
        items = sampled(benchmark, benchmark.load(root, spec.layout), spec.limit, spec.limit_seed)
        value, names = {"items": _items_digest(items, root), "count": len(items)}, Names.of(_paths(items, root))
        cache.write(value, text=names.text, ends=names.ends)
    else:
        value, names = known.value, Names(known.arrays["text"], known.arrays["ends"])
    return {**value, **image_listing(root, names, cache_folder)}


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
    cache = Cache(cache_folder, {"file": str(path.absolute())}, {"stat": _state(stat)})
    known = cache.read()
    if known is None:
        if stat.st_size >= TOLD_BYTES:
            log.warning(
                "reading %s (%.1f GB) to tell it from others; the next plan will know it", path, stat.st_size / 1e9
            )
        value = {"sha256": hash_file(path)}
        cache.write(value)
        return str(value["sha256"])
    return str(known.value["sha256"])


def _state(stat: os.stat_result) -> list[int]:
    """What changes when a file is written or replaced."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


# ---------------------------------------------------------------------------------------------------- sources


def _source_cache(annotations: Path, source: SourceSpec, folder: Path) -> Cache:
    try:
        stats = [path.stat() for path in _files(annotations)]
    except OSError as error:
        hint = source.how_to_get or "Put the file there, or correct the source's `annotations` or the data's `root`."
        raise DataError(f"annotation file {annotations}: not found ({error.strerror}). {hint}") from error
    where = {"path": str(annotations.absolute()), "images": source.images, "limit": source.limit}
    where |= {} if source.format == "llava" else {"layout": source.format}
    return Cache(folder, where, {"stat": list(map(_state, stats))})


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


class _Paths:
    """Paths of named images and videos, one by one; notes on the way whether there were videos."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names
        self.videos = False

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            path = video_path(name)
            self.videos = self.videos or path is not None
            yield name if path is None else path


def _image_paths(annotations: Path, source: SourceSpec) -> Iterator[str]:
    """Names of the images and videos of the first `limit` records, as often as they occur. Faults are `prepare`'s to report."""
    if source.format in ("llava", "questions"):
        for record in islice(read_records(annotations), source.limit):
            if not isinstance(record, dict):
                continue
            for key, mark in (("image", ""), ("video", VIDEO), ("videos", VIDEO)):
                named = record.get(key)
                yield from (mark + path for path in (named if isinstance(named, list) else [named]) if _is_path(path))
    else:
        for sample in islice(read_samples(annotations, source.format, videos=True), source.limit):
            yield from filter(_is_path, sample.images) if isinstance(sample, Sample) else ()


def _is_path(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and not is_embedded(name) and not name.startswith("data:")


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
                **({"part": ref.part} if ref.part is not None else {}),
                **({"sampling": ref.sampling.given()} if ref.sampling is not None else {}),
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
    """Files that hold the items' images; of an image that its table lacks the key, which names no file and so is missing."""
    lacking = [ref for item in items for ref in item.images if ref.data is None]
    return [_below(Path(ref.key) if ref.path.suffix == TABLE else ref.path, root) for ref in lacking]


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
