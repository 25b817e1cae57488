"""Connectors by the names that other tools give them, and their tensors' names there and here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinylmm.config.identities import ConnectorIdentity
from tinylmm.convert.tensors import Tensors
from tinylmm.errors import UserError

MODULE = "tinylmm.models.connectors"
MLP = f"{MODULE}.MLPConnector"
RESAMPLER = "tinylmm.models.query_connectors.PerceiverConnector"
VIDEO_MODULE = "tinylmm.models.video_connectors"
QFORMER = "tinylmm.models.query_connectors.QFormerConnector"
MLP_DEFAULTS = {"depth": 2, "activation": "gelu"}
QUERY_NORM = "qformer.layernorm."
"""Norm of our Q-Former's queries. The Factory's has no weights, which is as if they were one and zero."""
_QFORMER = (("qformer.encoder.", "bert.encoder."), ("attention.attention.", "attention.self."))
"""Part of our name -> part of the Factory's, whose Q-Former is BERT's code."""
_MLP_TYPE = re.compile(r"mlp(\d+)x_(gelu|relu)")
_HOW_DRAWN = ("init", "dropout")
"""Options that decide nothing about a trained connector."""


@dataclass(frozen=True)
class _Family:
    """A connector of ours that the LLaVA family has too, under a name of its own.

    Attributes:
        target: our class.
        prefix: what our tensor names have in front of the family's (`0.weight` there is `layers.0.weight` here).
        fields: our option -> the Factory's field of config.json and its default.
        fixed: our option -> the one value that the family's has.
        factory_only: TinyLLaVA Factory alone has it.
    """

    target: str
    prefix: str = ""
    fields: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    factory_only: bool = False


_QUERIES = ("num_queries", 128)
_CLIP_FIELDS = {"num_queries": ("num_queries", 512), "depth": ("num_resampler_layers", 3)}
"""Of TinyLLaVA-Video's, a fork of the Factory with the same layout."""
_HEADS = {"heads": 8, "head_dim": 64}
_FAMILY = {
    "identity": _Family(f"{MODULE}.IdentityConnector"),
    "linear": _Family(f"{MODULE}.LinearConnector", "linear."),
    "resampler": _Family(
        RESAMPLER,
        fields={"num_queries": _QUERIES, "depth": ("num_resampler_layers", 3)},
        fixed=_HEADS,
        factory_only=True,
    ),
    "naiveresampler": _Family(
        f"{VIDEO_MODULE}.NaiveResamplerConnector", fields=_CLIP_FIELDS, fixed=_HEADS, factory_only=True
    ),
    "groupresampler": _Family(
        f"{VIDEO_MODULE}.GroupResamplerConnector",
        fields={**_CLIP_FIELDS, "groups": ("group", 16)},
        fixed=_HEADS,
        factory_only=True,
    ),
    "qformer": _Family(
        QFORMER,
        fields={"num_queries": _QUERIES},
        fixed={"hidden_size": 768, "layers": 12, "heads": 12, "cross_attention_every": 2},
        factory_only=True,
    ),
}
"""`connector_type` / `mm_projector_type` -> ours; MLPs have a number and an activation in their names."""


def connector_of(target: str, options: Mapping[str, Any]) -> ConnectorIdentity:
    """Return the identity of a connector of ours."""
    return ConnectorIdentity.model_validate({"_target_": target, "options": dict(options)})


def spec_of_type(type_name: str, config: Mapping[str, Any] | None = None) -> ConnectorIdentity:
    """Return our connector for a `connector_type` / `mm_projector_type` of the LLaVA family.

    Args:
        type_name: the family's name.
        config: the Factory's config.json, which says how many queries and layers there are; None: not the Factory's.

    Raises:
        UserError: the type is none that can be imported.
    """
    if found := _MLP_TYPE.fullmatch(type_name):
        return connector_of(MLP, {"depth": int(found[1]), "activation": found[2]})
    known = _FAMILY.get(type_name)
    if known is None or (known.factory_only and config is None):
        raise UserError(
            f"the checkpoint's connector is '{type_name}', which cannot be imported. "
            "Importable are: identity, linear, mlp<N>x_gelu, mlp<N>x_relu, the Factory's resampler and qformer, "
            "and TinyLLaVA-Video's naiveresampler and groupresampler."
        )
    options = {option: (config or {}).get(key, default) for option, (key, default) in known.fields.items()}
    return connector_of(known.target, options)


def fields_of_spec(spec: ConnectorIdentity) -> dict[str, Any]:
    """Return what the Factory's config.json says of one of our connectors, the reverse of `spec_of_type`.

    Raises:
        UserError: the Factory has no such connector.
    """
    options = spec.options
    if spec.target == MLP:
        depth, activation = ({**MLP_DEFAULTS, **options}[key] for key in MLP_DEFAULTS)
        return {"connector_type": f"mlp{depth}x_{activation}"}
    name = str(spec.target).rpartition(".")[2]
    found = [(type_name, known) for type_name, known in _FAMILY.items() if known.target == spec.target]
    if not found:
        raise UserError(f"the connector is {name}, for which TinyLLaVA Factory's layout has no name here.")
    type_name, known = found[0]
    said = {*known.fields, *known.fixed, *_HOW_DRAWN}
    other = {option: value for option, value in options.items() if known.fixed.get(option, value) != value}
    if other or set(options) - said:
        differing = ", ".join(f"{option}={options[option]}" for option in sorted({*other, *(set(options) - said)}))
        raise UserError(f"the connector is {name} with {differing}, which the Factory's {type_name} cannot have.")
    return {"connector_type": type_name} | {
        key: options.get(option, default) for option, (key, default) in known.fields.items()
    }


def to_ours(spec: ConnectorIdentity, tensors: Tensors) -> Tensors:
    """Rename the family's connector tensors (`0.weight`, or `weight` of a linear one) to ours."""
    if spec.target == QFORMER:
        return {_replaced(name, [(theirs, ours) for ours, theirs in _QFORMER]): t for name, t in tensors.items()}
    prefix = _prefix(spec)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def from_ours(spec: ConnectorIdentity, tensors: Tensors) -> Tensors:
    """Rename our connector tensors to the family's."""
    if spec.target == QFORMER:
        return {_replaced(name, _QFORMER): tensor for name, tensor in tensors.items()}
    prefix = _prefix(spec)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _prefix(spec: ConnectorIdentity) -> str:
    return {MLP: "layers.", **{known.target: known.prefix for known in _FAMILY.values()}}.get(spec.target, "")


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
