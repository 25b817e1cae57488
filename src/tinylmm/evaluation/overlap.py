"""Images that a model was trained on and is asked about: found by content, whatever they are called. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tinylmm.store.integrity import hash_file


def overlapping_images(trained: Iterable[Path], asked: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Return (asked, trained) for every asked image whose bytes are those of a trained one, in the order asked.

    Files are compared by SHA-256, and only where two have the same size: of a million images few are read. An image that was
    saved again (another size, other compression) is another file and is not found.

    Args:
        trained, asked: files; those that do not exist are left out.
    """
    by_size: dict[int, list[Path]] = {}
    for path in dict.fromkeys(asked):
        size = _size(path)
        if size is not None:
            by_size.setdefault(size, []).append(path)
    seen: dict[str, Path] = {}
    for path in dict.fromkeys(trained):
        if _size(path) in by_size:
            seen.setdefault(hash_file(path), path)
    sizes = {_size(path) for path in seen.values()}
    candidates = ((path, hash_file(path)) for size, paths in by_size.items() if size in sizes for path in paths)
    return [(path, seen[found]) for path, found in candidates if found in seen]


def annotated_images(root: Path, annotations: str, images: str) -> list[Path]:
    """The image files that a source's annotation file names, sorted, each once.

    Raises:
        DataError: the annotation file is missing or unreadable.
    """
    from tinylmm.data.records import read_records

    names: set[str] = set()
    for record in read_records(root / annotations):
        named = record.get("image") if isinstance(record, dict) else None
        names.update(name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str))
    return [root / images / name for name in sorted(names)]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
