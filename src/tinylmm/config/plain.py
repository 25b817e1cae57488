"""Walking through a composed spec as plain data, before it is known to be valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def mapping_at(raw: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return the mapping at `path`, or an empty one where there is none: a wrong type there is pydantic's to report."""
    found: Any = raw
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every key and list item, parents first."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            yield below, item
            yield from walk(item, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
            yield from walk(item, f"{path}[{index}]")
