"""Checks of what is handed on to classes: architectures, and options of towers, connectors and data builders. No torch.

A name that a class does not take would otherwise change a stage's identity and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tinylmm.config.faults import unknown_key
from tinylmm.config.hub import read_config
from tinylmm.config.plain import mapping_at
from tinylmm.config.signatures import (
    argument_names,
    config_class,
    config_class_of_type,
    config_fields,
    nested_configs,
    rope_fields,
)
from tinylmm.errors import ConfigError, Fault

_NOT_OPTIONS = {
    "connector": {"vision_dim", "llm_dim"},
    "vision_tower": {"encoder", "select_layer", "select", "drop_first_token", "image"},
    "data": {"output", "seed"},
}
"""Arguments of a class that are no options: each has a key of its own, or comes from the built parts."""
_HUB_LLM = "tinylmm.models.llm.HubCausalLM"
_HUB_ENCODER = "tinylmm.models.encoders.HubEncoder"
_ROPE = "rope_parameters"


def check_parts(raw: Mapping[str, Any]) -> list[Fault]:
    """Return a fault for every name in an `architecture` or in `options` that nothing reads.

    Args:
        raw: the composed spec as plain data. Parts that come from a finished model are left out: their files decide.
    """
    faults: list[Fault] = []
    if not mapping_at(raw, "recipe").get("from_model"):
        for group, key in (("llm", "_target_"), ("vision_tower", "encoder")):
            faults += check_architecture(group, mapping_at(raw, group), key)
    for group in ("connector", "vision_tower"):
        faults += _check_options(group, mapping_at(raw, group), group)
    builds = {"data": mapping_at(raw, "data", "build")}
    builds |= {
        f"{group}.build.data": mapping_at(raw, group, "build", "data", "build") for group in ("llm", "vision_tower")
    }
    builds |= {f"eval.{name}.data": mapping_at(raw, "eval", name, "data", "build") for name in mapping_at(raw, "eval")}
    for where, build in builds.items():
        faults += _check_options(f"{where}.build", build, "data")
    return faults


def check_architecture(group: str, part: Mapping[str, Any], key: str) -> list[Fault]:
    """Judge the names in a part's `architecture` by the fields of its config class.

    Args:
        group: where the part stands.
        part: it, as plain data.
        key: which of its keys names the class that has the architecture.
    """
    architecture, target = mapping_at(part, "architecture"), part.get(key)
    if not architecture or not isinstance(target, str):
        return []
    if target == _HUB_ENCODER:
        what = "is set, but this tower takes its architecture from the checkpoint's own config.json."
        return [Fault(f"{group}.architecture", what, "Remove it.")]
    if target == _HUB_LLM:
        kind = architecture.get("model_type") or _model_type(part)
        config = config_class_of_type(kind) if isinstance(kind, str) else None
        architecture = {name: value for name, value in architecture.items() if name != "model_type"}
    else:
        config = config_class(target)
    return list(_unknown_fields(f"{group}.architecture", architecture, config)) if config is not None else []


def _unknown_fields(where: str, architecture: Mapping[str, Any], config: str) -> Iterator[Fault]:
    fields = config_fields(config)
    if fields is None:
        return
    nested = nested_configs(config)
    for name, value in architecture.items():
        if name not in fields:
            yield unknown_key(f"{where}.{name}", str(name), fields)
        elif name in nested and isinstance(value, Mapping):
            yield from _unknown_fields(f"{where}.{name}", value, nested[name])
        elif name == _ROPE and isinstance(value, Mapping):
            yield from _unknown_rope(f"{where}.{name}", value)


def _unknown_rope(where: str, rope: Mapping[str, Any]) -> Iterator[Fault]:
    """Judge `rope_parameters`: one mapping for all layers, or one for each kind of layer."""
    known = (*rope_fields(), "type")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            yield from _unknown_rope(f"{where}.{name}", value)
        elif name not in known:
            yield unknown_key(f"{where}.{name}", str(name), rope_fields())


def _check_options(where: str, part: Mapping[str, Any], role: str) -> list[Fault]:
    options, target = mapping_at(part, "options"), part.get("_target_")
    names = argument_names(target) if options and isinstance(target, str) else None
    if names is None:
        return []
    allowed = [name for name in names if name not in _NOT_OPTIONS[role]]
    return [
        unknown_key(f"{where}.options.{name}", str(name), allowed)
        for name in options
        if name not in allowed and not str(name).startswith("_")
    ]


def _model_type(part: Mapping[str, Any]) -> Any:
    """What kind of model a checkpoint says it is, where a copy of its config.json is on this machine."""
    pretrained, revision = part.get("pretrained"), part.get("revision")
    if not isinstance(pretrained, str):
        return None
    try:
        return (read_config(pretrained, revision) or {}).get("model_type")
    except ConfigError:  # said when the run is planned
        return None
