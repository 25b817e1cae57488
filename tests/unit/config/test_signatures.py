"""What a class takes is read from its source, as the class itself would say it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import transformers

from tinylmm.config.signatures import argument_names, config_class, config_fields, nested_configs, rope_fields
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.query_connectors import QFormerConnector


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("transformers.LlamaForCausalLM", "transformers.models.llama.configuration_llama.LlamaConfig"),
        ("transformers.Gemma3ForCausalLM", "transformers.models.gemma3.configuration_gemma3.Gemma3TextConfig"),
        ("transformers.SiglipVisionModel", "transformers.models.siglip.configuration_siglip.SiglipVisionConfig"),
        ("transformers.models.phi.modeling_phi.PhiForCausalLM", "transformers.models.phi.configuration_phi.PhiConfig"),
        ("tinylmm.models.openelm.OpenELMForCausalLM", "tinylmm.models.openelm_config.OpenELMConfig"),
        ("tinylmm.models.mof.MoFEncoder", "tinylmm.models.mof.MoFConfig"),
        ("tinylmm.models.llm.HubCausalLM", None),
        ("no_such_package.Model", None),
    ],
)
def test_a_models_config_class_is_found(model: str, expected: str | None) -> None:
    assert config_class(model) == expected


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "PhiConfig", "Gemma2Config", "CLIPVisionConfig", "Dinov2Config", "DINOv3ViTConfig"]
)
def test_fields_are_those_of_the_class_itself(name: str) -> None:
    config = getattr(transformers, name)
    own = {f.name for f in fields(config)} - {f.name for f in fields(transformers.PreTrainedConfig)}
    found = set(config_fields(f"{config.__module__}.{name}") or ())
    assert {field for field in own if not field.startswith("_")} <= found
    assert not {"architectures", "dtype", "hiden_size"} & found


def test_nested_configs_are_resolved() -> None:
    nested = nested_configs("tinylmm.models.mof.MoFConfig")
    assert nested["clip"].endswith("configuration_clip.CLIPVisionConfig")
    assert "mlp_ratio" in (config_fields(nested["dinov2"]) or ())


def test_rotary_parameters_are_known() -> None:
    assert {"rope_type", "rope_theta", "partial_rotary_factor", "factor"} <= set(rope_fields())


@pytest.mark.parametrize("cls", [MLPConnector, QFormerConnector])
def test_arguments_are_those_of_the_signature(cls: type) -> None:
    assert argument_names(f"{cls.__module__}.{cls.__name__}") == tuple(inspect.signature(cls).parameters)


def test_arguments_of_a_function_hold_its_typed_rest() -> None:
    assert argument_names("tinylmm.data.embedded.build_digits") == (
        "output", "seed", "pretrain", "share", "finetune", "text", "test",
    )  # fmt: skip


def test_nothing_heavy_is_loaded() -> None:
    code = "import sys; from tinylmm.config.signatures import *; config_fields(config_class('transformers.PhiForCausalLM'));"
    code += (
        "argument_names('tinylmm.models.connectors.MLPConnector'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
