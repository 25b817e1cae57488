"""A benchmark's questions on disk, and their identity: what decides a score besides the model. No torch.

The identity is made of the questions as the benchmark reads them (prompts, references, which images), not of its files: the
same questions in another folder or file format of equal content are the same evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tinylmm.config.spec import EvalSpec
from tinylmm.errors import ConfigError, Fault
from tinylmm.evaluation.benchmarks.base import Benchmark, Item
from tinylmm.evaluation.benchmarks.digits import Digits
from tinylmm.evaluation.benchmarks.registry import get_benchmark
from tinylmm.evaluation.benchmarks.scoring import pick_variant
from tinylmm.planning.fingerprints import MISSING_SHOWN

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp4", ".avi", ".webm", ".mkv"}
_CACHE_FORMAT = 1


def find_benchmark(name: str, options: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark called `name`, with options of its class.

    Raises:
        ConfigError: there is none (the message lists those that exist), or it has no such option.
    """
    try:
        return Digits(**options) if name == Digits.name else get_benchmark(name, **options)
    except TypeError as error:
        what = f"do not fit benchmark {name}: {str(error).partition(' ')[2]}."
        raise ConfigError([Fault(f"eval.{name}.options", what)]) from error


def check_variant(key: str, spec: EvalSpec) -> None:
    """Refuse a scoring variant that the benchmark lacks: before a run starts, not when its answers are to be scored.

    Raises:
        ConfigError: names `eval.<key>.variant`, with the variants that there are.
    """
    try:
        pick_variant(find_benchmark(spec.benchmark, spec.options), spec.variant)
    except ConfigError as error:
        faults = [Fault(f"eval.{key}.variant", f.what, f.fix) if f.where == "variant" else f for f in error.faults]
        raise ConfigError(faults) from error


def load_items(benchmark: Benchmark, root: Path, layout: Any, limit: int | None) -> list[Item]:
    """The benchmark's questions, or the first `limit` of them.

    Raises:
        DataError: a file is missing (which, where, how to get it), or a record is broken.
    """
    return benchmark.load(root, layout)[:limit]


def benchmark_fingerprint(
    name: str, root: Path, layout: str, limit: int | None, cache: Path, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return {"items", "images", "count", "num_images", "missing", "num_missing"}.

    `items` is the SHA-256 of all questions, `images` that of the sorted (path, size) of the image and parquet files that
    they are about; `missing` are the first of those that are not there. What the questions are is cached in `cache` for
    as long as no file beside the images changes; images are looked up every time.

    Raises:
        ConfigError: the benchmark is unknown.
        DataError: as `load_items`.
    """
    benchmark = find_benchmark(name, options or {})
    key: dict[str, Any] = {"format": _CACHE_FORMAT, "benchmark": name, "options": dict(options or {}), "layout": layout}
    key |= {"root": str(root.absolute()), "limit": limit}
    place = cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    key["files"] = _signature(root)
    known = _cached(place, key)
    if known is None:
        items = load_items(benchmark, root, layout, limit)
        known = {"items": _digest(items, root), "count": len(items), "paths": _paths(items, root)}
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"key": key, "value": known}), encoding="utf-8")
        part.replace(place)
    return {"items": known["items"], "count": known["count"], **_listing(root, known["paths"])}


def _digest(items: Sequence[Item], root: Path) -> str:
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


def _listing(root: Path, paths: Sequence[str]) -> dict[str, Any]:
    state, missing = hashlib.sha256(), []
    for path in paths:
        try:
            size = os.stat(root / path).st_size  # noqa: PTH116 - hundreds of thousands of calls
        except (OSError, ValueError):
            size = -1
            missing.append(path)
        state.update(json.dumps([path, size]).encode() + b"\n")
    counts = {"num_images": len(paths), "missing": missing[:MISSING_SHOWN], "num_missing": len(missing)}
    return {"images": state.hexdigest(), **counts}


def _signature(root: Path) -> str:
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


def _cached(place: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What was cached for these files as they are; a damaged file counts as none."""
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record["value"] if isinstance(record, dict) and record.get("key") == key else None
