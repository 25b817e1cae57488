"""Claims about the spec models: frozen, closed, dumped by the YAML's own names, faults told in plain words."""

import json
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from tinylmm.config.faults import describe, faults_of, keys_of, paths_by_leaf
from tinylmm.config.fields import TemplateName
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import RecipeSpec, RecipeStage, TuneHow, TuneSpec
from tinylmm.config.spec import RunSpec, SourceSpec, TokenizerSpec
from tinylmm.data.chat import TEMPLATES

STAGE: dict[str, Any] = {
    "from": "parts",
    "data": "pretrain",
    "tune": {},
    "lr": 1e-3,
    "global_batch": 8,
    "max_length": 64,
    "template": "pretrain",
}


def test_a_spec_cannot_be_changed_and_takes_no_unknown_key() -> None:
    stage = RecipeStage.model_validate(STAGE)
    with pytest.raises(ValidationError, match="frozen"):
        stage.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        RecipeStage.model_validate(STAGE | {"learning_rate": 1})


def test_a_spec_is_dumped_and_loaded_by_the_names_of_the_yaml() -> None:
    stage = RecipeStage.model_validate(STAGE)
    dump = stage.model_dump(mode="json")
    assert dump["from"] == "parts" and "start" not in dump
    assert RecipeStage.model_validate_json(json.dumps(dump)) == stage


def test_only_the_connector_is_trained_by_default() -> None:
    assert TuneSpec().model_dump() == {"llm": "frozen", "vision_tower": "frozen", "connector": "full"}


@pytest.mark.parametrize("from_layer", [0, 12, 0.5])
def test_a_layer_is_an_index_or_a_fraction(from_layer: float) -> None:
    tune = TuneSpec.model_validate({"vision_tower": {"from_layer": from_layer}}).vision_tower
    assert isinstance(tune, TuneHow) and tune.from_layer == from_layer and type(tune.from_layer) is type(from_layer)


def test_lora_in_a_word_is_lora_in_its_default_numbers() -> None:
    word, numbers = TuneSpec.model_validate({"llm": "lora"}), TuneSpec.model_validate({"llm": {"lora": {"r": 128}}})
    assert word == numbers
    assert word.model_dump(mode="json")["llm"] == {
        "lora": {"r": 128, "alpha": 256.0, "dropout": 0.05, "targets": "all-linear", "bias": "none", "rslora": False}
    }


@pytest.mark.parametrize(
    ("tune", "fault"),
    [
        (
            {"lora": {"r": 8}, "from_layer": 1},
            "tune.llm: names from_layer and lora of from_layer, lora and qlora; it must",
        ),
        ({}, "tune.llm: names none of from_layer, lora and qlora"),
        ({"lora": {"rank": 8}}, "tune.llm.lora.rank: there is no key 'rank' here."),
        ({"qlora": {"bits": 3}}, "tune.llm.qlora.bits: is 3; it must be one of 4, 8."),
        ({"lora": {"dropout": 1.0}}, "tune.llm.lora.dropout: is 1.0; it must be a number of at least 0 and below 1."),
    ],
    ids=str,
)
def test_a_wrong_way_of_tuning_is_told_at_its_own_key(tune: dict[str, Any], fault: str) -> None:
    raw = {"llm": tune}
    with pytest.raises(ValidationError) as caught:
        TuneSpec.model_validate_json(json.dumps(raw), strict=True)
    (found,) = faults_of(caught.value, TuneSpec, raw, "tune")
    assert str(found).startswith(fault)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (TokenizerSpec, {}, "either `pretrained` or `vocab_size`"),
        (TokenizerSpec, {"pretrained": "x", "vocab_size": 5}, "either `pretrained` or `vocab_size`"),
        (SourceSpec, {"annotations": "x", "on_bad": "skip"}, "max_bad"),
        (SourceSpec, {"annotations": "x", "max_bad": 3}, "set on_bad=skip too"),
        (LaunchSpec, {"nproc": 2}, "backend=torchrun"),
        (LaunchSpec, {"deepspeed_stage": 2}, "backend=torchrun"),
        (
            RecipeSpec,
            {"name": "r", "published_data": "d", "stages": {"a": STAGE | {"from": "b"}}},
            "none of the earlier",
        ),
        (
            RecipeSpec,
            {"name": "r", "published_data": "d", "stages": {"a": STAGE | {"from": "a"}}},
            "none of the earlier",
        ),
        (RecipeSpec, {"name": "r", "published_data": "d", "stages": {}}, "trains nothing, so set recipe.from_model"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(model: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model.model_validate(values)


def test_a_fault_of_a_union_is_told_once_in_plain_words() -> None:
    raw = STAGE | {"lr": "fast", "tune": {"llm": "half"}}
    with pytest.raises(ValidationError) as caught:
        RecipeStage.model_validate_json(json.dumps(raw), strict=True)
    assert [str(fault) for fault in faults_of(caught.value, RecipeStage, raw, "recipe.stages.a")] == [
        "recipe.stages.a.tune.llm: is 'half'; it must be one of frozen, full, lora, qlora, "
        "or a mapping with from_layer, lora, qlora.",
        "recipe.stages.a.lr: is 'fast'; it must be a number above 0, "
        "or a mapping from llm, vision_tower, connector to a number above 0.",
    ]


def test_every_key_can_be_described_and_found_by_its_last_segment() -> None:
    assert all(describe(field.annotation) for field in keys_of(LaunchSpec).values())
    paths = list(paths_by_leaf(RunSpec))
    assert ("lr", "recipe.stages.<name>.lr") in paths and ("_target_", "llm._target_") in paths


def test_the_templates_that_a_spec_may_name_are_those_that_have_a_layout() -> None:
    assert get_args(TemplateName) == tuple(TEMPLATES)
