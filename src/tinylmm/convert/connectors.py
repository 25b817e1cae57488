"""Connectors by the names that other tools give them, and their tensors' names there and here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tinylmm.convert.tensors import Tensors
from tinylmm.errors import UserError

MODULE = "tinylmm.models.connectors"
MOF, RESAMPLER = f"{MODULE}.MoFMLPConnector", "tinylmm.models.query_connectors.PerceiverConnector"
QFORMER = "tinylmm.models.query_connectors.QFormerConnector"
OUR_PREFIX = {
    MOF: "",
    RESAMPLER: "",
    f"{MODULE}.IdentityConnector": "",
    f"{MODULE}.LinearConnector": "linear.",
    f"{MODULE}.MLPConnector": "layers.",
}
"""Connector class -> what our tensor names have in front of the family's (`0.weight` there is `layers.0.weight` here)."""
_QFORMER = (("qformer.encoder.", "bert.encoder."), ("attention.attention.", "attention.self."))
"""Part of our name -> part of the Factory's, whose Q-Former is BERT's code."""
_MLP = re.compile(r"mlp(\d+)x_(gelu|relu)")


def spec_of_type(type_name: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return our connector spec for a `connector_type` / `mm_projector_type` of the LLaVA family.

    Args:
        type_name: the family's name.
        config: the Factory's config.json, which says `num_queries` and `num_resampler_layers`.

    Raises:
        UserError: the type is none that can be imported.
    """
    if type_name in ("linear", "identity"):
        return {"_target_": f"{MODULE}.{type_name.capitalize()}Connector", "options": {}}
    if found := _MLP.fullmatch(type_name):
        return {"_target_": f"{MODULE}.MLPConnector", "options": {"depth": int(found[1]), "activation": found[2]}}
    fields = config or {}
    if type_name == "mof_mlp":
        return {"_target_": MOF, "options": {}}
    if type_name == "resampler" and config is not None:
        options = {"num_queries": fields.get("num_queries", 128), "depth": fields.get("num_resampler_layers", 3)}
        return {"_target_": RESAMPLER, "options": options}
    if type_name == "qformer":
        return {"_target_": QFORMER, "options": {"num_queries": fields.get("num_queries", 128)}}
    raise UserError(
        f"the checkpoint's connector is '{type_name}', which cannot be imported. "
        "Importable are: identity, linear, mlp<N>x_gelu, mlp<N>x_relu, and the Factory's mof_mlp, resampler and qformer."
    )


def type_of_spec(spec: dict[str, Any]) -> str:
    """Return the family's name of one of our connectors, the reverse of `spec_of_type`.

    Raises:
        UserError: the family has no such connector.
    """
    others = {MOF: "mof_mlp", RESAMPLER: "resampler", QFORMER: "qformer"}
    if spec["_target_"] in others:
        return others[spec["_target_"]]
    name = str(spec["_target_"]).rpartition(".")[2]
    if spec["_target_"] not in OUR_PREFIX:
        raise UserError(f"the connector is {name}, for which TinyLLaVA Factory's layout has no name here.")
    if name == "MLPConnector":
        options = spec.get("options", {})
        return f"mlp{options.get('depth', 2)}x_{options.get('activation', 'gelu')}"
    return name.removesuffix("Connector").lower()


def to_ours(spec: dict[str, Any], tensors: Tensors) -> Tensors:
    """Rename the family's connector tensors (`0.weight`, or `weight` of a linear one) to ours."""
    if spec["_target_"] == QFORMER:
        return {_replaced(name, [(theirs, ours) for ours, theirs in _QFORMER]): t for name, t in tensors.items()}
    return {OUR_PREFIX[spec["_target_"]] + name: tensor for name, tensor in tensors.items()}


def from_ours(spec: dict[str, Any], tensors: Tensors) -> Tensors:
    """Rename our connector tensors to the family's."""
    if spec["_target_"] == QFORMER:
        return {_replaced(name, _QFORMER): tensor for name, tensor in tensors.items()}
    return {name.removeprefix(OUR_PREFIX[spec["_target_"]]): tensor for name, tensor in tensors.items()}


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
