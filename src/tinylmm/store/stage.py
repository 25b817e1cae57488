"""Identity by content: canonical JSON, its SHA-256 digest, and a readable difference between two specs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any


def canonical_json(value: Any) -> str:
    """Serialise so that equal values give equal bytes: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot carry.
        TypeError: `value` holds something JSON cannot carry.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def difference(old: Any, new: Any) -> list[str]:
    """Return one line a differing leaf, `key: old -> new`, in key order."""
    return [f"{path or '(whole)'}: {a!r} -> {b!r}" for path, a, b in _walk("", old, new)]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _walk(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _walk(f"{path}.{key}" if path else str(key), old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _walk(f"{path}[{index}]", a, b)
    elif old != new:
        yield path, old, new
