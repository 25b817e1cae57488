"""A stage and its identity: the SHA-256 of the canonical JSON of everything that decides its result. No torch here.

What a stage is told besides (names, folders, launch, tracking) is recorded as its settings and never decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tinylmm.store.layout import stage_key


@dataclass(frozen=True)
class Stage:
    """A stage of the graph, as JSON: what the store keeps. Two stages with equal digests are the same stage.

    Attributes:
        kind: key of `planning/kinds.py`.
        name: what the stage is called in its run ("finetune"), for people.
        digest: of its identity, 64 hexadecimal digits.
        version: of the kind's code; raised by hand when a change of it changes what a stage of this kind produces.
        spec: the fields that decide its result.
        parents: role -> digest of the parent.
        settings: how to run it; decides nothing.
    """

    kind: str
    name: str
    digest: str
    version: int
    spec: dict[str, Any]
    parents: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls, kind: str, name: str, version: int, spec: dict[str, Any], parents: dict[str, str], settings: dict[str, Any]
    ) -> Stage:
        """Return the stage with the digest of these fields."""
        return cls(kind, name, digest(_identity(kind, version, spec, parents)), version, spec, parents, settings)

    @property
    def identity(self) -> dict[str, Any]:
        """What the digest is made of, as it reads back from JSON."""
        fields = _identity(self.kind, self.version, self.spec, self.parents)
        identity: dict[str, Any] = json.loads(canonical_json(fields))
        return identity

    @property
    def key(self) -> str:
        """Folder name in the store."""
        return stage_key(self.kind, self.digest)


def _identity(kind: str, version: int, spec: dict[str, Any], parents: dict[str, str]) -> dict[str, Any]:
    return {"kind": kind, "version": version, "spec": spec, "parents": parents}


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
