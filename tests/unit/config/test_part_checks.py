"""A name that nothing reads is refused, wherever it is handed on to a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinylmm.config.part_checks import check_parts

DIGITS = "tinylmm.data.embedded.build_digits"


def faults(raw: dict[str, Any]) -> dict[str, str]:
    return {fault.where: f"{fault.what} {fault.fix}" for fault in check_parts(raw)}


def llm(architecture: dict[str, Any], target: str = "transformers.LlamaForCausalLM", **more: Any) -> dict[str, Any]:
    return {"llm": {"_target_": target, "architecture": architecture, **more}}


def test_a_misspelt_field_of_an_architecture_gets_a_suggestion() -> None:
    found = faults(llm({"hiden_size": 32, "rope_theta": 1.0, "hidden_act": "silu"}))
    assert list(found) == ["llm.architecture.hiden_size"]
    assert "there is no key 'hiden_size' here. Did you mean 'hidden_size'?" in found["llm.architecture.hiden_size"]


def test_rotary_parameters_are_judged_for_all_layers_and_for_each_kind() -> None:
    found = faults(llm({"rope_parameters": {"rope_teta": 1.0, "sliding_attention": {"rope_tipe": "default"}}}))
    assert list(found) == [
        "llm.architecture.rope_parameters.rope_teta",
        "llm.architecture.rope_parameters.sliding_attention.rope_tipe",
    ]


def test_openelm_has_fields_of_its_own() -> None:
    found = faults(llm({"model_dim": 64, "hidden_dim": 64}, "tinylmm.models.openelm.OpenELMForCausalLM"))
    assert list(found) == ["llm.architecture.hidden_dim"]


def test_an_encoder_of_two_is_judged_by_both() -> None:
    architecture = {"clip": {"mlp_ratio": 4}, "dinov2": {"mlp_ratio": 4}, "siglip": {}}
    tower = {"encoder": "tinylmm.models.mof.MoFEncoder", "architecture": architecture}
    found = faults({"vision_tower": tower})
    assert list(found) == ["vision_tower.architecture.clip.mlp_ratio", "vision_tower.architecture.siglip"]


def test_a_model_from_the_hub_is_judged_by_its_own_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "a_key_of_its_own": 1}))
    hub = {"target": "tinylmm.models.llm.HubCausalLM", "pretrained": str(tmp_path), "revision": None}
    assert list(faults(llm({"attention_dropuot": 0.0}, **hub))) == ["llm.architecture.attention_dropuot"]
    assert not faults(llm({}, **hub)) and not faults(llm({"attention_dropout": 0.0}, **hub))
    named = llm({"model_type": "phi", "resid_pdrop": 0.0, "rms_norm_eps": 1.0}, hub["target"])
    assert list(faults(named)) == ["llm.architecture.rms_norm_eps"]


def test_a_tower_from_the_hub_takes_no_architecture() -> None:
    tower = {"encoder": "tinylmm.models.encoders.HubEncoder", "architecture": {"hidden_size": 32}}
    assert "own config.json" in faults({"vision_tower": tower})["vision_tower.architecture"]


def test_parts_of_a_finished_model_are_described_by_its_files_alone() -> None:
    assert not faults(llm({"a_key_of_its_own": 1}) | {"recipe": {"from_model": "run"}})


@pytest.mark.parametrize(
    ("raw", "where", "words"),
    [
        (
            {"connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {"dept": 3}}},
            "connector.options.dept",
            "Did you mean 'depth'? Allowed: depth, activation, init.",
        ),
        (
            {"vision_tower": {"_target_": "tinylmm.models.mof.MoFTower", "options": {"refrence": True, "image": {}}}},
            "vision_tower.options.refrence",
            "Did you mean 'reference'?",
        ),
        (
            {"data": {"build": {"_target_": DIGITS, "options": {"train_scenes": 3}}}},
            "data.build.options.train_scenes",
            "Allowed: pretrain, share, finetune, text, test.",
        ),
        (
            {"eval": {"digits": {"data": {"build": {"_target_": DIGITS, "options": {"tst": 3}}}}}},
            "eval.digits.data.build.options.tst",
            "Did you mean 'test'?",
        ),
    ],
    ids=["connector", "tower", "data", "data of a benchmark"],
)  # fmt: skip
def test_an_option_that_a_class_does_not_take_is_refused(raw: dict[str, Any], where: str, words: str) -> None:
    assert words in faults(raw)[where]


def test_a_class_of_ones_own_is_judged_by_its_source_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import no_such_module\n")
    text = "from tinylmm.models.connectors import Connector, MLPConnector\n\n\n"
    text += "class Narrow(Connector):\n    def __init__(self, vision_dim, llm_dim, waist=8): ...\n\n\n"
    text += "class Wide(MLPConnector):\n    def __init__(self, *args, **kwargs): ...\n"
    (tmp_path / "mine/parts.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def said_of(target: str) -> str | None:
        found = faults({"connector": {"_target_": target, "options": {"waste": 8}}})
        return found.get("connector.options.waste")

    assert "Did you mean 'waist'?" in (said_of("mine.parts.Narrow") or "")
    assert "depth" in (said_of("mine.parts.Wide") or "")
    assert said_of("mine.absent.Narrow") is None
