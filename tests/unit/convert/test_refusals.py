"""What must not come in: pickles with code, tensors without a place, and parts that do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.foreign import (
    factory_config,
    factory_tensors,
    foreign,
    llava_config,
    llava_tensors,
    write_factory_folders,
    write_merged,
)
from tinylmm.convert.conversion import import_model
from tinylmm.convert.lora import merge_lora, read_adapter
from tinylmm.convert.tensors import read_file, read_weights
from tinylmm.errors import DataError, UserError


class Malicious:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_nothing(tmp_path: Path, legacy: bool) -> None:
    write_factory_folders(tmp_path / "factory", foreign())
    witness, evil = tmp_path / "witness", tmp_path / "factory/connector/pytorch_model.bin"
    payload = {"_connector.0.weight": torch.ones(1), "x": Malicious(witness)}
    torch.save(payload, evil, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"connector/pytorch_model\.bin is refused: .*posix.*could run code"):
        import_model(tmp_path / "factory", tmp_path / "model")
    assert not witness.exists() and not (tmp_path / "model").exists()
    torch.load(evil, weights_only=False)  # the trap is live
    assert witness.exists()


def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path: Path) -> None:
    parts = foreign()
    tensors, config = factory_tensors(parts), factory_config(parts)
    cases = {
        "extra.weight": ({**tensors, "extra.weight": torch.ones(1)}, r"no part of the model uses: extra\.weight"),
        "in the llm": (
            {**tensors, "language_model.model.layers.0.odd": torch.ones(1)},
            r"language model .*belong to nothing in it: model\.layers\.0\.odd",
        ),
        "missing": (
            {k: v for k, v in tensors.items() if not k.endswith("layers.1.mlp.up_proj.weight")},
            r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        "shape": (
            {**tensors, "connector._connector.2.bias": torch.ones(3)},
            r"connector .*layers\.2\.bias is \[3\], not \[32\]",
        ),
        "tower": (
            {k: v for k, v in tensors.items() if "encoder.layers.1.mlp.fc1.bias" not in k},
            r"vision tower .*missing: encoder\.layers\.1\.mlp\.fc1\.bias",
        ),
    }
    for name, (changed, message) in cases.items():
        write_merged(tmp_path / name, config, changed)
        with pytest.raises(UserError, match=message):
            import_model(tmp_path / name, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model*"))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    parts = foreign(tied=True)
    tensors = factory_tensors(parts)
    tensors["language_model.lm_head.weight"] += 1
    write_merged(tmp_path / "tied", factory_config(parts), tensors)
    with pytest.raises(UserError, match=r"the config ties .*lm_head\.weight.*but their tensors differ"):
        import_model(tmp_path / "tied", tmp_path / "model")


def test_settings_that_cannot_be_kept_are_refused_by_name(tmp_path: Path) -> None:
    parts = foreign("clip")
    wrong = {
        "connector_type": ("moe", r"connector is 'moe'"),
        "image_aspect_ratio": ("anyres", r"image_aspect_ratio is 'anyres'"),
        "vision_feature_select_strategy": ("mean", r"vision_feature_select_strategy is 'mean'"),
    }
    write_merged(tmp_path / "factory", factory_config(parts), factory_tensors(parts))
    for key, (value, message) in wrong.items():
        (tmp_path / "factory/config.json").write_text(json.dumps(factory_config(parts, **{key: value})))
        with pytest.raises(UserError, match=message):
            import_model(tmp_path / "factory", tmp_path / "model")
    write_merged(tmp_path / "llava", llava_config(parts, mm_patch_merge_type="spatial_unpad"), llava_tensors(parts))
    with pytest.raises(UserError, match="mm_patch_merge_type=spatial_unpad"):
        import_model(tmp_path / "llava", tmp_path / "model")
    with pytest.raises(UserError, match=r"unknown layout 'factry'\. Did you mean 'factory'"):
        import_model(tmp_path / "llava", tmp_path / "model", layout="factry")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        import_model(tmp_path / "llava", tmp_path / "model")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    parts = foreign()
    write_merged(tmp_path / "m", factory_config(parts), factory_tensors(parts))
    index = tmp_path / "m/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="do not name the same tensors: ghost"):
        read_weights(tmp_path / "m")
    content["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no plain file name"):
        read_weights(tmp_path / "m")
    for name in ("half.bin", "half.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut short")
        with pytest.raises(DataError, match=f"{name} is damaged"):
            read_file(tmp_path / name)
    torch.save({"step": 3}, tmp_path / "state.bin")
    with pytest.raises(UserError, match=r"entries that are no tensors: step"):
        read_file(tmp_path / "state.bin")


def test_merging_equals_pefts_own_merge_and_orphans_are_named(tmp_path: Path) -> None:
    llm = foreign().llm
    base = {k: v.clone() for k, v in llm.state_dict().items()}
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        init_lora_weights=False,
    )
    wrapped = get_peft_model(llm, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    settings, adapter = read_adapter(tmp_path / "adapter")
    merged = merge_lora(base, settings, adapter, "test")
    expected = wrapped.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    assert not torch.equal(merged["model.layers.0.mlp.down_proj.weight"], base["model.layers.0.mlp.down_proj.weight"])
    lone = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)}
    with pytest.raises(UserError, match=r"without their partner: model\.layers\.0\.self_attn\.q_proj"):
        merge_lora(base, settings, lone, "test")
