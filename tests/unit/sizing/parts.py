"""Parts as layers, from the YAMLs, beside the real classes: tiny with weights, and at full size without memory for any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinylmm.sizing.connectors import connector_part
from tinylmm.sizing.layers import Part
from tinylmm.sizing.llms import llm_part
from tinylmm.sizing.towers import TowerOutputShape, tower_part


def llm_layers(spec: Mapping[str, Any], architecture: Mapping[str, Any]) -> Part:
    """The LLM of a YAML with some architecture."""
    return llm_part(spec["_target_"], architecture)


def tower_layers(identity: Mapping[str, Any], **output: Any) -> Part:
    """The tower of a YAML."""
    read = {"select_layer": -2, "select": "patch", "drop_first_token": False}
    read |= {key: identity[key] for key in read if key in identity} | output
    shape = TowerOutputShape(image_size=identity["image"]["size"], **read)
    return tower_part(identity["_target_"], identity["encoder"], identity["architecture"], shape)


def connector_layers(spec: Mapping[str, Any], tower: Part, llm: Part, tiled: bool = False) -> Part:
    """The connector of a YAML between two parts."""
    return connector_part(spec["_target_"], spec.get("options", {}), tower.width, tower.tokens, llm.width, tiled)
