"""Parameters of a part, total and trained, are those of the real one: at tiny size with weights, at full size without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.builders import build, tuning
from tests.unit.models import test_product as product
from tests.unit.models import test_towers as towers
from tests.unit.models.llms import NAMES, choice, shrink, tiny_llm
from tests.unit.sizing.parts import connector_layers, llm_layers, tower_layers
from tinylmm.config.identities import TowerOutput
from tinylmm.config.recipe import TuneSpec
from tinylmm.config.spec import ImageSpec
from tinylmm.config.targets import resolve_target
from tinylmm.models.llm import random_llm
from tinylmm.models.vision import make_tower, num_parameters
from tinylmm.sizing.layers import Linear, Part, UnknownShapeError
from tinylmm.sizing.llms import llm_part
from tinylmm.sizing.parameters import total_parameters, trained_parameters

LORA = {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "bias": "none"}}
SOME = {"lora": LORA["lora"] | {"targets": ["q_proj", "v_proj"], "bias": "lora_only"}}
WITH_BIASES = {"lora": LORA["lora"] | {"bias": "all"}}
TUNES: dict[str, Any] = {
    "frozen": "frozen",
    "full": "full",
    "from_layer": {"from_layer": 1},
    "from_half": {"from_layer": 0.5},
    "lora": LORA,
    "lora on some": SOME,
    "lora with biases": WITH_BIASES,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_llm_of_conf_has_as_many_parameters_as_its_class_at_full_size(name: str) -> None:
    spec = choice(name)
    with torch.device("meta"):
        real = random_llm(resolve_target(spec["_target_"]), spec["architecture"], "auto")
    assert total_parameters(llm_layers(spec, spec["architecture"])) == num_parameters(real)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tinyllama", {"attention_bias": True, "mlp_bias": True}),
        ("tinyllama", {"tie_word_embeddings": True}),
        ("tinyllama", {"num_key_value_heads": None}),
        ("phi2", {"qk_layernorm": True}),
        ("stablelm2", {"qk_layernorm": True}),
        ("stablelm2", {"use_parallel_residual": True}),
        ("gemma3_270m", {"attention_bias": True}),
        ("openelm_270m", {"ffn_with_glu": False, "normalize_qk_projections": False}),
        ("openelm_270m", {"share_input_output_layers": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_an_architecture_count(name: str, changes: dict[str, Any]) -> None:
    spec = choice(name)
    assert total_parameters(llm_layers(spec, shrink(spec["architecture"]) | changes)) == num_parameters(
        tiny_llm(name, **changes)
    )


@pytest.mark.parametrize("name", towers.NAMES)
def test_every_tower_of_conf_has_as_many_parameters_as_its_class_at_full_size(name: str) -> None:
    identity = copy.deepcopy(choice(name, "vision_tower"))
    encoder_class: Any = resolve_target(identity["encoder"], role="encoder")
    output = {
        key: identity[key] for key in ("select_layer", "select", "drop_first_token", "options") if key in identity
    }
    with torch.device("meta"):
        encoder = encoder_class(encoder_class.config_class(**identity["architecture"]))
        real = make_tower(
            resolve_target(identity["_target_"], role="vision_tower"),
            encoder,
            TowerOutput(**output),
            ImageSpec(**identity["image"]),
        )
    part = tower_layers(identity)
    assert (total_parameters(part), part.tokens) == (num_parameters(real), real.num_tokens)


def towers_of(connector: str) -> str:
    return "mof" if connector in product.TWO_ENCODERS_ONLY else "siglip"


def parts_of(spec: dict[str, Any]) -> dict[str, Part]:
    tower, llm = tower_layers(spec["vision_tower"]), llm_layers(spec["llm"], spec["llm"]["architecture"])
    return {"llm": llm, "vision_tower": tower, "connector": connector_layers(spec["connector"], tower, llm)}


def written_out(tune: Any) -> Any:
    """As the planner gives it."""
    return TuneSpec.model_validate({"llm": tune}).model_dump(mode="json", exclude_none=True)["llm"]


def applies(how: Any, part: Part) -> bool:
    """Without a second block there is none to begin from, and peft refuses adapters where no layer takes one."""
    if isinstance(how, dict) and "from_layer" in how:
        return len(part.blocks) > 1
    adapted = [layer for layer in part.layers() if isinstance(layer, Linear) and layer.adapts]
    if isinstance(how, dict) and how["lora"]["targets"] != "all-linear":
        return {layer.name for layer in adapted} >= set(how["lora"]["targets"])
    return bool(adapted)


def cases() -> list[tuple[str, str, str, str, str]]:
    """LLM, tower, connector, the part that is looked at (every kind once) and how it is trained."""
    found = [(llm, "siglip", "mlp", "llm") for llm in product.LLMS]
    found += [("tinyllama", tower, "linear", "vision_tower") for tower in product.TOWERS]
    found += [("tinyllama", towers_of(name), name, "connector") for name in product.CONNECTORS]
    layers = [parts_of(product.spec_of(*case[:3]))[case[3]] for case in found]
    return [
        (*case, tune) for case, part in zip(found, layers, strict=True) for tune in TUNES if applies(TUNES[tune], part)
    ]


@pytest.mark.parametrize(("llm", "tower", "connector", "part", "tune"), cases())
def test_what_a_stage_trains_is_counted_as_it_is_trained(
    llm: str, tower: str, connector: str, part: str, tune: str
) -> None:
    spec, how = product.spec_of(llm, tower, connector), TUNES[tune]
    layers = parts_of(spec)[part]
    model = build(spec)
    total = num_parameters(getattr(model, part))
    tune_spec = {"llm": "frozen", "vision_tower": "frozen", "connector": "frozen"}
    tune_spec["connector" if part == "llm" else "llm"] = "full"  # something must be trained
    decided = tuning(model, tune_spec | {part: how})
    assert total_parameters(layers) == total
    assert trained_parameters(layers, written_out(how)) == decided[part].trained


def test_the_newlines_of_tiled_images_are_trained_with_their_connector() -> None:
    spec = product.spec_of("tinyllama", "siglip", "mlp")
    spec["vision_tower"]["image"] |= {"mode": "anyres"}
    layers = parts_of(spec)
    tiled = connector_layers(spec["connector"], layers["vision_tower"], layers["llm"], tiled=True)
    assert trained_parameters(tiled, "full") == num_parameters(build(spec).connector)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "type 'mamba'"),
        ({"model_type": "llama", "hidden_size": 8}, "says nothing of num_hidden_layers"),
    ],
    ids=["family", "number"],
)
def test_what_is_not_known_is_said(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownShapeError, match=reason):
        llm_part("tinylmm.models.llm.HubCausalLM", config)
