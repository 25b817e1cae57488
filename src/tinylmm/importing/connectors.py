"""Connectors by the names that other tools give them, and their tensors' names there and here."""

from __future__ import annotations

import re
from typing import Any

from tinylmm.errors import UserError
from tinylmm.importing.tensors import Tensors

MODULE = "tinylmm.models.connectors"
OUR_PREFIX = {
    f"{MODULE}.IdentityConnector": "",
    f"{MODULE}.LinearConnector": "linear.",
    f"{MODULE}.MLPConnector": "layers.",
}
"""Connector class -> what our tensor names have in front of the family's (`0.weight` there is `layers.0.weight` here)."""
_MLP = re.compile(r"mlp(\d+)x_(gelu|relu)")


def spec_of_type(type_name: str) -> dict[str, Any]:
    """Return our connector spec for a `connector_type` / `mm_projector_type` of the LLaVA family.

    Raises:
        UserError: the type is none that can be imported.
    """
    if type_name in ("linear", "identity"):
        return {"_target_": f"{MODULE}.{type_name.capitalize()}Connector", "options": {}}
    if found := _MLP.fullmatch(type_name):
        return {"_target_": f"{MODULE}.MLPConnector", "options": {"depth": int(found[1]), "activation": found[2]}}
    raise UserError(
        f"the checkpoint's connector is '{type_name}', which cannot be imported. "
        "Importable are: identity, linear, mlp<N>x_gelu and mlp<N>x_relu."
    )


def type_of_spec(spec: dict[str, Any]) -> str:
    """Return the family's name of one of our connectors, the reverse of `spec_of_type`.

    Raises:
        UserError: the family has no such connector.
    """
    name = str(spec["_target_"]).rpartition(".")[2]
    if spec["_target_"] not in OUR_PREFIX:
        raise UserError(f"the connector is {name}, for which TinyLLaVA Factory's layout has no name here.")
    if name == "MLPConnector":
        options = spec.get("options", {})
        return f"mlp{options.get('depth', 2)}x_{options.get('activation', 'gelu')}"
    return name.removesuffix("Connector").lower()


def to_ours(spec: dict[str, Any], tensors: Tensors) -> Tensors:
    """Rename the family's connector tensors (`0.weight`, or `weight` of a linear one) to ours."""
    return {OUR_PREFIX[spec["_target_"]] + name: tensor for name, tensor in tensors.items()}


def from_ours(spec: dict[str, Any], tensors: Tensors) -> Tensors:
    """Rename our connector tensors to the family's."""
    return {name.removeprefix(OUR_PREFIX[spec["_target_"]]): tensor for name, tensor in tensors.items()}
