"""What is exported for the Factory has its names and keys, and comes back equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import VISION, WIDTH, redescribe, tiny_loaded
from tests.foreign import foreign, write_factory_folders
from tinylmm.convert.conversion import import_model, write_model
from tinylmm.convert.format import Export
from tinylmm.convert.formats import factory
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel, load_model, set_image_mode
from tinylmm.models.connectors import Connector
from tinylmm.models.query_connectors import PerceiverConnector, QFormerConnector
from tinylmm.models.video_connectors import GroupResamplerConnector, NaiveResamplerConnector

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


def loaded_with(connector: Connector, name: str, **options: object) -> LoadedModel:
    loaded = tiny_loaded()
    loaded.model.connector = connector
    redescribe(loaded, connector={"_target_": f"{type(connector).__module__}.{name}", "options": options})
    return loaded


def test_a_resampler_goes_with_its_number_of_queries_and_layers(tmp_path: Path) -> None:
    options = {"num_queries": 5, "depth": 2}
    loaded = loaded_with(PerceiverConnector(VISION["hidden_size"], WIDTH, **options), "PerceiverConnector", **options)
    write_model(loaded, tmp_path / "factory", "factory", torch.float32, *NAMES)
    config = json.loads((tmp_path / "factory/config.json").read_text())
    assert [config[key] for key in ("connector_type", "num_queries", "num_resampler_layers")] == ["resampler", 5, 2]
    import_model(tmp_path / "factory", tmp_path / "again")
    again = load_model(tmp_path / "again", []).model
    assert again.image_tokens == 5
    before, after = loaded.model.connector.state_dict(), again.connector.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "options", "fields"),
    [
        (NaiveResamplerConnector, {"num_queries": 6, "depth": 2}, {"connector_type": "naiveresampler"}),
        (
            *(GroupResamplerConnector, {"num_queries": 6, "groups": 3, "depth": 2}),
            {"connector_type": "groupresampler", "group": 3},
        ),
    ],
)
def test_tinyllava_videos_resamplers_go_out_and_come_in(
    kind: type[Connector], options: dict[str, int], fields: dict[str, object], tmp_path: Path
) -> None:
    loaded = loaded_with(kind(VISION["hidden_size"], WIDTH, **options), kind.__name__, **options)
    write_model(loaded, tmp_path / "factory", "factory", torch.float32, *NAMES)
    config = json.loads((tmp_path / "factory/config.json").read_text())
    assert config.items() >= {**fields, "num_queries": 6, "num_resampler_layers": 2}.items()
    names = {name for name in load_file(tmp_path / "factory/model.safetensors") if name.startswith("connector.")}
    assert {"connector._connector.latents", "connector._connector.layers.1.0.to_kv.weight"} <= names
    import_model(tmp_path / "factory", tmp_path / "again")
    again = load_model(tmp_path / "again", []).model
    assert type(again.connector) is kind and again.image_tokens == 6
    before, after = loaded.model.connector.state_dict(), again.connector.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        again.eval().image_embeddings(pixels, None), loaded.model.eval().image_embeddings(pixels, None)
    )


def test_what_the_factory_cannot_have_is_refused_with_every_reason(tmp_path: Path) -> None:
    few = PerceiverConnector(VISION["hidden_size"], WIDTH, num_queries=5, heads=4)
    loaded = loaded_with(few, "PerceiverConnector", num_queries=5, heads=4, init="normal")
    with pytest.raises(UserError) as raised:
        write_model(loaded, tmp_path / "a", "factory", torch.float32)
    text = str(raised.value)
    assert "this model cannot be a checkpoint of TinyLLaVA Factory" in text and "give --llm and --tower" in text
    assert "PerceiverConnector with heads=4, which the Factory's resampler cannot have" in text
    small = {"hidden_size": 24, "layers": 2, "heads": 2}
    queries = QFormerConnector(VISION["hidden_size"], WIDTH, num_queries=5, **small)
    trained = loaded_with(queries, "QFormerConnector", num_queries=5)
    assert factory.obstacles(Export(trained, torch.float32, *NAMES)) == []
    with torch.no_grad():
        queries.qformer.layernorm.bias += 1
    reasons = factory.obstacles(Export(trained, torch.float32, *NAMES))
    assert reasons == ["the norm of the Q-Former's queries was trained, and the Factory's has no weights."]


def test_a_model_that_sees_tiles_is_refused_as_its_own_importer_would(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    set_image_mode(loaded, "anyres", seed=0)
    with pytest.raises(UserError, match=r"its images are seen in tiles \(anyres\)"):
        write_model(loaded, tmp_path / "a", "factory", torch.float32, *NAMES)
    assert not (tmp_path / "a").exists()


def test_names_are_asked_for_unless_the_model_was_imported_with_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --llm and --tower"):
        write_model(tiny_loaded(), tmp_path / "a", "factory", torch.float32)
    write_factory_folders(tmp_path / "source", foreign())
    import_model(tmp_path / "source", tmp_path / "model")
    write_model(load_model(tmp_path / "model", []), tmp_path / "b", "factory", torch.float32)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["llm_model_name_or_path"] == NAMES[0] and config["vision_feature_select_strategy"] == "patch"
