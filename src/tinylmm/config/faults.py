"""Turns what pydantic finds into `Fault`s in the YAML's words: dotted key, value found, what is allowed, suggestion.

One fault a key, whatever the number of a union's branches that refused the value; no word of pydantic's own.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tinylmm.config.overrides import looks_secret, redacted
from tinylmm.errors import Fault, suggestion

_MISSING = "is missing."
_SHOWN = 60  # characters of a value that a message shows


def faults_of(error: ValidationError, model: type[BaseModel], raw: Mapping[str, Any], prefix: str = "") -> list[Fault]:
    """Return one fault a key for everything that `error` holds.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        raw: the plain data that was validated, for the values to show.
        prefix: dotted key under which `raw` stands in the whole spec.
    """
    faults: dict[str, Fault] = {}
    for entry in error.errors(include_url=False, include_context=True):
        place = _locate(model, entry["loc"], raw)
        if place is None:
            continue
        path, annotation = place
        where = ".".join([*([prefix] if prefix else []), *map(str, path)])
        faults.setdefault(where, _fault(where, path, annotation, entry, raw))
    return [fault for fault in faults.values() if not _is_misspelt(fault, faults.values())]


def _is_misspelt(fault: Fault, others: Iterable[Fault]) -> bool:
    """Whether a key is missing only because it is there misspelt, which has a fault of its own."""
    parent, _, key = fault.where.rpartition(".")
    hint = f"Did you mean '{key}'?"
    return fault.what == _MISSING and any(hint in o.fix and o.where.rpartition(".")[0] == parent for o in others)


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by the names that YAML uses (`_target_`, `from`)."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def paths_by_leaf(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (last segment, dotted path) of every key below `model`; `<name>` stands for a key that the user chooses."""
    for key, field in keys_of(model).items():
        path = f"{prefix}{key}"
        yield key, path
        for branch in _branches(field.annotation):
            if _is_model(branch):
                yield from paths_by_leaf(branch, f"{path}.")
            elif get_origin(branch) is dict and _is_model(get_args(branch)[1]):
                yield from paths_by_leaf(get_args(branch)[1], f"{path}.<name>.")


def _fault(where: str, path: Sequence[Any], annotation: Any, entry: Any, raw: Mapping[str, Any]) -> Fault:
    kind = entry["type"]
    if kind == "extra_forbidden" or (entry["loc"] and entry["loc"][-1] == "[key]"):
        return unknown_key(where, str(path[-1]), _allowed_keys(annotation))
    if kind == "missing" and not isinstance(_lookup(raw, path), list):
        return Fault(where, _MISSING, f"It must be {describe(annotation)}.")
    if kind == "value_error":
        return Fault(where or "(run)", str(entry["ctx"]["error"]))
    value = _lookup(raw, path)
    hint = suggestion(value, _literals(annotation)) if isinstance(value, str) else ""
    if isinstance(value, bool | int | float) and str in _branches(_plain(annotation)[0]):
        as_text = str(value).lower() if isinstance(value, bool | int) else "..."  # of 1e5 only the number is known
        hint = f"To give it as text, put it in quotes: {where}='\"{as_text}\"'"
    return Fault(where, f"is {show(where, value)}; it must be {describe(annotation)}.", hint)


def unknown_key(where: str, name: str, allowed: Sequence[str]) -> Fault:
    """Return the fault for a key that nothing reads."""
    hint = suggestion(name.lower(), allowed)
    return Fault(
        where, f"there is no key '{name}' here.", " ".join(filter(None, [hint, f"Allowed: {', '.join(allowed)}."]))
    )


def show(where: str, value: Any) -> str:
    """Return `value` for a message: as YAML writes it, short, and never a secret."""
    if looks_secret(where):
        return "(hidden)"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, list):
        return redacted(f"[{', '.join(map(str, value))}]")[:_SHOWN]
    text = redacted(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def describe(annotation: Any) -> str:
    """Return what values a type accepts, in plain words."""
    base, constraints = _plain(annotation)
    branches = _branches(base)
    if len(branches) > 1:
        return ", or ".join(describe(branch) for branch in branches)
    if get_origin(base) is Literal:
        values = [str(value) for value in get_args(base)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if base in (int, float):
        return ("a whole number" if base is int else "a number") + _range(constraints)
    if _is_model(base):
        return f"a mapping with {', '.join(keys_of(base))}"
    origin = get_origin(base)
    if origin is dict:
        key, value = get_args(base)
        names = f"from {describe(key).removeprefix('one of ')} to " if _literals(key) else "of names to "
        return f"a mapping {names}{describe(value)}" if value is not Any else "a mapping"
    if origin in (tuple, list):
        items = get_args(base)
        count = "" if Ellipsis in items or origin is list else f"{len(items)} "
        return f"a list of {count}values, each {describe(items[0])}"
    return {str: "text", bool: "true or false", Path: "a path", type(None): "null"}.get(base, "plain data")


def _range(constraints: Mapping[str, Any]) -> str:
    if {"ge", "le"} <= constraints.keys():
        return f" from {constraints['ge']} to {constraints['le']}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    parts = [f"{words[name]} {limit}" for name, limit in constraints.items()]
    return f" {' and '.join(parts)}" if parts else ""


def _locate(model: type[BaseModel], loc: Sequence[Any], raw: Any) -> tuple[list[Any], Any] | None:
    """Follow pydantic's location to (path in the YAML, type there), or None for noise of a union's other branches."""
    path: list[Any] = []
    annotation: Any = model
    parent: Any = model
    for segment in loc:
        base, _ = _plain(annotation)
        branches = [branch for branch in _branches(base) if branch is not type(None)]
        if len(branches) > 1:
            branch = _mapping_branch(branches)
            if branch is None or not isinstance(_lookup(raw, path), Mapping):
                return path, annotation
            name = branch.__name__ if _is_model(branch) else "dict["
            if not (str(segment).startswith(name) or str(segment).endswith(f", {name}]")):  # the latter has validators
                return None
            annotation = branch
            continue
        base = _plain(branches[0])[0]
        value = _lookup(raw, path)
        if isinstance(segment, int) and isinstance(value, list) and segment >= len(value):
            return path, annotation  # a list that is too short: the fault is the list's
        if segment == "[key]":
            return path, parent
        parent, path = base, [*path, segment]
        if _is_model(base):
            field = keys_of(base).get(str(segment))
            if field is None:
                return path, base
            annotation = Annotated[field.annotation, field]
        elif get_origin(base) is dict:
            annotation = get_args(base)[1]
        elif get_origin(base) in (tuple, list):
            annotation = get_args(base)[0]
    return path, annotation


def _plain(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """A type without `Annotated`, and its limits by name (gt, ge, lt, le)."""
    constraints: dict[str, Any] = {}
    while get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        for extra in extras:
            for item in extra.metadata if isinstance(extra, FieldInfo) else [extra]:
                limits = {name: getattr(item, name, None) for name in ("gt", "ge", "lt", "le")}
                constraints |= {name: limit for name, limit in limits.items() if limit is not None}
    return annotation, constraints


def _branches(annotation: Any) -> list[Any]:
    base, _ = _plain(annotation)
    if get_origin(base) in (Union, types.UnionType):
        return [part for branch in get_args(base) for part in _branches_keeping_limits(branch)]
    return [annotation]


def _branches_keeping_limits(branch: Any) -> list[Any]:
    return _branches(branch) if get_origin(_plain(branch)[0]) in (Union, types.UnionType) else [branch]


def _mapping_branch(branches: Sequence[Any]) -> Any | None:
    return next(
        (base for base in (_plain(b)[0] for b in branches) if _is_model(base) or get_origin(base) is dict), None
    )


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _literals(annotation: Any) -> list[str]:
    bases = [_plain(branch)[0] for branch in _branches(annotation)]
    return [str(value) for base in bases if get_origin(base) is Literal for value in get_args(base)]


def _allowed_keys(annotation: Any) -> list[str]:
    base, _ = _plain(annotation)
    return list(keys_of(base)) if _is_model(base) else _literals(get_args(base)[0])


def _lookup(raw: Any, path: Sequence[Any]) -> Any:
    for segment in path:
        if isinstance(raw, Mapping):
            raw = raw.get(segment)
        elif isinstance(raw, Sequence) and not isinstance(raw, str) and isinstance(segment, int) and segment < len(raw):
            raw = raw[segment]
        else:
            return None
    return raw
