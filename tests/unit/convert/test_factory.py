"""What is exported for the Factory has its names and keys, and comes back equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import tiny_loaded
from tests.foreign import foreign, write_factory_folders
from tinylmm.convert.conversion import import_model, write_model
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import load_model

NAMES = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "google/siglip-so400m-patch14-384")


@pytest.mark.parametrize("folders", [False, True], ids=["merged", "folders"])
def test_a_model_goes_to_the_factory_and_comes_back_equal(tmp_path: Path, folders: bool) -> None:
    loaded = tiny_loaded()
    report = write_model(
        loaded, tmp_path / "factory", "factory-folders" if folders else "factory", torch.float32, *NAMES
    )
    imported = import_model(tmp_path / "factory", tmp_path / "again")
    assert imported.layout == ("factory-folders" if folders else "factory") and not imported.ignored
    again = load_model(tmp_path / "again", [])
    before = loaded.model.state_dict() | loaded.model.vision_tower.whole_encoder_state()
    after = again.model.state_dict() | again.model.vision_tower.whole_encoder_state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert report.tensors == len(loaded.model.llm.state_dict()) + 4 + len(
        loaded.model.vision_tower.whole_encoder_state()
    )
    assert again.model.image_tokens == loaded.model.image_tokens
    assert any("'llama'" in note for note in report.notes)


def test_the_merged_save_has_the_factorys_names(tmp_path: Path) -> None:
    write_model(tiny_loaded(), tmp_path / "factory", "factory", torch.float16, *NAMES)
    tensors = load_file(tmp_path / "factory/model.safetensors")
    assert {
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower._vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "connector._connector.0.weight",
        "connector._connector.2.bias",
    } <= set(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = json.loads((tmp_path / "factory/config.json").read_text())
    assert config["connector_type"] == "mlp2x_gelu" and config["vision_feature_select_strategy"] == "cls_patch"
    assert config["vision_feature_layer"] == -2 and config["image_token_index"] == -200
    assert config["llm_model_name_or_path"] == NAMES[0] and config["vision_config"]["model_name_or_path"] == NAMES[1]


def test_names_are_asked_for_unless_the_model_was_imported_with_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --llm and --tower"):
        write_model(tiny_loaded(), tmp_path / "a", "factory", torch.float32)
    write_factory_folders(tmp_path / "source", foreign())
    import_model(tmp_path / "source", tmp_path / "model")
    write_model(load_model(tmp_path / "model", []), tmp_path / "b", "factory", torch.float32)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["llm_model_name_or_path"] == NAMES[0] and config["vision_feature_select_strategy"] == "patch"
