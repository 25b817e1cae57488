"""What is frozen, as it is now. `write.py` writes it to the JSON files beside this, the tests compare it with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tests.frozen import product
from tests.frozen.combinations import COMBINATIONS, NEVER_VARY, SPECIMENS

FOLDER = Path(__file__).parent
VERSIONS = ("transformers_version", "tinylmm_version", "peft_version")
OPAQUE = {"architecture", "options", "trainer", "text_tower", "content", "lr", "mixture"}
"""Fields of an identity whose keys are not the spec's own."""


@cache
def frozen(name: str) -> Any:
    """The content of one of the JSON files."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- digests


def write_model() -> None:
    """Write ./model, a model's folder as far as it is read without torch."""
    folder = Path("model")
    for name, content in frozen_model().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def frozen_model() -> dict[str, Any]:
    """Files of a model of TinyLlama and CLIP in small, as the product wrote them when this was frozen."""
    llm = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "dtype": "float32"}
    tower = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 3, "image_size": 16}
    image = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "mode": "squash", "resample": "bicubic"}
    config = {
        "model_type": "tinylmm",
        "format": 1,
        "llm": {"_target_": "transformers.LlamaForCausalLM"},
        "vision_tower": {
            "_target_": "tinylmm.models.vision.HFVisionTower",
            "encoder": "transformers.CLIPVisionModel",
            "select_layer": -2,
            "select": "patch",
            "drop_first_token": False,
            "options": {},
        },
        "connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {"depth": 2}},
        "image": image,
        "template": "llama",
    }
    return {"config.json": config, "llm/config.json": llm, "vision_tower/config.json": tower, "tokenizer/a.json": {}}


def composed(words: list[str]) -> list[product.Stage]:
    """The stages of a combination; to be called in an empty folder."""
    if any(word.startswith("recipe.from_model=") for word in words):
        write_model()
    return product.stages(words)


def digest_lines(stages: Iterable[product.Stage]) -> list[str]:
    """One line a stage, in the graph's order."""
    return [f"{stage.kind:7} {stage.name:32} {stage.digest}" for stage in stages]


def identity(stage: product.Stage, stages: Iterable[product.Stage]) -> dict[str, Any]:
    """What a stage's digest is made of; parents by their names, as their digests are frozen elsewhere."""
    names = {other.digest: other.name for other in stages}
    parents = {role: names[digest] for role, digest in sorted(stage.parents.items())}
    return {"kind": stage.kind, "spec": stage.spec, "parents": parents}


def digests() -> dict[str, list[str]]:
    """Combination -> its stages.

    Raises:
        ValueError: a field of an identity has the same value in all combinations.
    """
    found = {name: composed(words) for name, words in COMBINATIONS.items()}
    seen: dict[tuple[str, str], set[str]] = {}
    for stages in found.values():
        for stage in stages:
            for field, value in _fields(stage.spec):
                seen.setdefault((stage.kind, field), set()).add(json.dumps(value, sort_keys=True))
    constant = {field for field, values in seen.items() if len(values) == 1} - NEVER_VARY
    if constant:
        raise ValueError(f"these fields have one value in all combinations: {sorted(constant)}")
    return {name: digest_lines(stages) for name, stages in found.items()}


def _fields(spec: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in spec.items():
        if isinstance(value, dict) and key not in OPAQUE:
            yield from _fields(value, f"{path}{key}.")
        else:
            yield path + key, value


def specs() -> dict[str, dict[str, Any]]:
    """Combination -> stage -> identity, for the specimens."""
    found: dict[str, dict[str, Any]] = {}
    for name, wanted in SPECIMENS.items():
        stages = composed(COMBINATIONS[name])
        by_name = {stage.name: stage for stage in stages}
        found[name] = {stage: identity(by_name[stage], stages) for stage in wanted}
    return found


RECORDS: dict[str, Callable[[Path], Any]] = {"digests": lambda folder: digests(), "specs": lambda folder: specs()}
"""File name -> what is in it, made in an empty working folder."""
