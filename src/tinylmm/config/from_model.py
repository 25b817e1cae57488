"""A recipe that starts from a finished or imported model: its parts are read from the model's folder. JSON only, no torch.

What the groups llm, vision_tower and connector say is replaced by what the folder holds, so that a plan, a record and the
recipe's own numbers are about the model that is trained. A group that the user chose in so many words must agree with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from tinylmm.config.description import ModelDescription
from tinylmm.config.fields import PARTS
from tinylmm.errors import Fault, IntegrityError, UserError
from tinylmm.store.find_model import find_model

KEY = "recipe.from_model"
_NOT_ARCHITECTURE = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "quantization_config", "auto_map",
    "attn_implementation", "experts_implementation", "code_revision", "name_or_path", "use_cache",
}  # fmt: skip
"""Keys of a saved config.json that say how it was saved or run, not what the network looks like."""
_OF_THE_RUN = (["name"], ["template"], ["scale"])
"""Keys of a group that say nothing about the part itself."""


def take_parts(cfg: DictConfig, words: Sequence[str]) -> list[Fault]:
    """Put the parts of the model at `recipe.from_model` into the composed config, in place; return what is wrong.

    Args:
        cfg: composed config with a `recipe.from_model`: a model's folder, the folder of a training stage, or a run's name.
        words: the user's words, to tell a group that was chosen from a default.
    """
    given = str(cfg.recipe.from_model)
    try:
        folder = find_model(given, Path(str(cfg.store))).resolve()
    except (UserError, IntegrityError) as error:
        return [Fault(KEY, f"names no model: {error}")]
    try:
        parts = _parts(folder)
    except (IntegrityError, OSError, ValueError, KeyError, TypeError) as error:
        return [Fault(KEY, f"is '{given}', whose files do not describe a model: {type(error).__name__}: {error}.")]
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    faults = []
    for part in PARTS:
        composed: Any = OmegaConf.to_container(cfg[part], resolve=False)
        differs = _difference(composed, parts[part])
        if differs and any(key.split(".")[0] == part and key.split(".")[1:2] not in _OF_THE_RUN for key in keys):
            fix = f"Leave {part} out: a recipe with from_model takes its parts from the model."
            faults.append(Fault(part, f"is not that of the model at {folder}: {differs}.", fix))
            continue
        faults += _unread_fields(part, parts[part]["architecture"] if part != "connector" else None, keys, folder)
        found = parts[part] if differs else {**composed, **parts[part], "name": composed["name"]}
        if f"{part}.template" in keys:
            found["template"] = composed["template"]
        if differs and part == "llm":
            found = {**found, **_given_scale(composed, keys)}
        with open_dict(cfg):
            cfg[part] = found
    with open_dict(cfg):
        cfg.recipe.from_model = str(folder)
    return faults


def _unread_fields(part: str, saved: Mapping[str, Any] | None, keys: set[str], folder: Path) -> list[Fault]:
    """Refuse fields of an architecture that the user set and the model's own does not name: nothing would read them."""
    prefix = f"{part}.architecture."
    unread = [
        key for key in sorted(keys) if key.startswith(prefix) and key[len(prefix) :].split(".")[0] not in (saved or {})
    ]
    what = f"is set, but the model at {folder} was saved without it."
    return [
        Fault(key, what, "Leave it out: a recipe with from_model takes its parts from the model.") for key in unread
    ]


def _given_scale(composed: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """What the user set of `llm.scale`, without the numbers of the LLM that the model's takes the place of."""
    scale: dict[str, Any] = {}
    for role, numbers in (composed.get("scale") or {}).items():
        whole = {"llm.scale", f"llm.scale.{role}"} & keys
        given = numbers if whole else {name: n for name, n in numbers.items() if f"llm.scale.{role}.{name}" in keys}
        if given:
            scale[role] = given
    return {"scale": scale} if scale else {}


def _parts(folder: Path) -> dict[str, dict[str, Any]]:
    """The groups' values as the model's folder has them."""
    description = ModelDescription.of_folder(folder)
    said = description.as_json()
    tokenizer = {"pretrained": str(folder / "tokenizer"), "revision": None, "pad_token": None, "vocab_size": None}
    llm = said["llm"] | _origin(folder / "llm") | {"tokenizer": tokenizer, "template": description.template}
    if "scale_image_features" in said:
        llm["scale_image_features"] = description.scale_image_features
    tower = said["vision_tower"] | _origin(folder / "vision_tower") | {"image": said["image"]}
    name = description.connector.target.rpartition(".")[2]
    return {"llm": llm, "vision_tower": tower, "connector": {"options": {}, **said["connector"], "name": name}}


def _origin(folder: Path) -> dict[str, Any]:
    config = _read(folder / "config.json")
    architecture = {
        key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE and not key.startswith("_")
    }
    return {
        "name": str(config["model_type"]),
        "pretrained": str(folder),
        "revision": None,
        "init": "pretrained",
        "architecture": architecture,
        "build": None,
    }


def _difference(composed: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first few values in which a group differs from the model's part, in words; empty if it agrees."""
    same = ("_target_", "encoder", "architecture", "image", "select_layer", "select", "drop_first_token", "options")
    lines = [
        f"{path} is {ours}, the model's {theirs}"
        for key in same
        if key in composed and key in found
        for path, ours, theirs in _walk(key, composed[key], found[key])
    ]
    return "; ".join(lines[:3])


def _walk(path: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Leaves that both have and that differ: a saved config leaves out what equals its class's default."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in ours.keys() & theirs.keys():
            yield from _walk(f"{path}.{key}", ours[key], theirs[key])
    elif ours != theirs:
        yield path, ours, theirs


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping")
    return found
