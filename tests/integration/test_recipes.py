"""Recipes through the command, in this process: adapters, quantised weights, models of finished runs, exact resumption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import folder_bytes
from tests.integration.project import Project, tiny_project
from tinylmm.cli.train import run
from tinylmm.errors import ConfigError
from tinylmm.models.checkpoint import load_model
from tinylmm.training import trainer

SHORT = ("recipe.stages.pretrain.max_steps=2", "recipe.stages.finetune.max_steps=2")
RANK = ("recipe.stages.finetune.tune.llm.lora.r=4", "recipe.stages.finetune.tune.llm.lora.alpha=8")
QRANK = tuple(word.replace("lora", "qlora") for word in RANK)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One store for all tests here: what one of them trained, the next one reuses."""
    project = tiny_project(tmp_path_factory.mktemp("recipes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        yield project


@pytest.fixture(scope="module")
def lora(project: Project) -> Path:
    """The model of the run `lora`."""
    assert train(project, "recipe=lora", "name=lora", *SHORT, *RANK) == 0
    return model_of(project, "lora")


@pytest.fixture(scope="module")
def mine(project: Project, lora: Path) -> Path:
    """The same model in a folder of the user's."""
    return Path(shutil.copytree(lora, project.root / "mine"))


def train(project: Project, *words: str) -> int:
    return run([*project.words, *words])


def stages(project: Project, name: str) -> dict[str, str]:
    """Stage -> status, in the run of this name."""
    record = json.loads((project.store / "runs" / name / "run.json").read_text())
    return {stage["name"]: stage["status"] for stage in record["stages"]}


def model_of(project: Project, name: str) -> Path:
    """The model that the last stage of the run of this name trained."""
    record = json.loads((project.store / "runs" / name / "run.json").read_text())
    return project.store / "stages" / record["stages"][-1]["key"] / "output/model"


def own_data(project: Project) -> list[str]:
    """Words of `data=custom`: the finetuning file under another name, and the folder it lies in."""
    shutil.copy(project.root / "data/finetune.json", project.root / "data/mine.json")
    words = [f"data.root={project.root / 'data'}", "data.sources.finetune.annotations=mine.json"]
    return [*words, "data.sources.finetune.images=images"]


def test_lora_adds_an_adapter_to_a_linked_base_and_trains_the_connector(project: Project, lora: Path) -> None:
    model, before = lora, project.model("pretrain")
    assert (model / "llm/model.safetensors").samefile(before / "llm/model.safetensors")
    assert json.loads((model / "adapters/llm/adapter_config.json").read_text())["r"] == 4
    adapter = load_file(model / "adapters/llm/adapter_model.safetensors")
    assert len(adapter) == 2 * 14 and all(tensor.abs().sum() > 0 for tensor in adapter.values())
    old, new = (load_file(folder / "connector/model.safetensors") for folder in (before, model))
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert not (model.parents[1] / "kept").exists()


def test_qlora_reuses_the_pretraining_and_loads_as_it_was_trained(project: Project, lora: Path) -> None:
    assert train(project, "recipe=qlora", "name=qlora", *SHORT, *QRANK) == 0
    assert stages(project, "qlora")["pretrain"] == "reused"
    described = json.loads((model_of(project, "qlora") / "config.json").read_text())
    assert described["adapters"] == {"llm": {"quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True}}}
    loaded = load_model(model_of(project, "qlora"), [])
    base = load_file(model_of(project, "qlora") / "llm/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(loaded.model.llm.get_parameter(name), base[name])


def image_mode(model: Path) -> str:
    return str(json.loads((model / "config.json").read_text())["image"]["mode"])


def test_a_stage_trains_in_its_own_image_mode_and_leaves_it_to_those_who_use_its_model(
    project: Project, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(project, "recipe=bench", "name=bench", *SHORT) == 0
    assert stages(project, "bench")["pretrain"] == "reused", "the tower's own mode is base's"
    bench = model_of(project, "bench")
    assert (image_mode(project.model("pretrain")), image_mode(bench)) == ("squash", "pad")
    # the same said the other way round is another identity, and the same weights
    monkeypatch.setenv("TINYLMM_STORE", str(tmp_path / "store"))
    words = ["vt.image.mode=pad", "recipe.stages.pretrain.image_mode=square", "name=padded", *SHORT]
    assert train(project, *words) == 0
    padded = model_of(Project(tmp_path, ()), "padded")
    assert padded.parts[-3] != bench.parts[-3] and image_mode(padded) == "pad"
    assert (padded / "llm/model.safetensors").read_bytes() == (bench / "llm/model.safetensors").read_bytes()
    assert train(project, "name=square", *SHORT) == 0
    square = model_of(Project(tmp_path, ()), "square")
    assert (square / "llm/model.safetensors").read_bytes() != (bench / "llm/model.safetensors").read_bytes()


def test_images_in_tiles_from_one_stage_on_teach_the_connector_a_newline(project: Project, lora: Path) -> None:
    """The embedding's width, 32, and what the connector had learned before it: tiles begin in the finetuning."""
    words = ["recipe.stages.finetune.image_mode=anyres", "recipe.stages.finetune.max_length=256", "name=tiles", *SHORT]
    assert train(project, *words) == 0
    connector = load_file(model_of(project, "tiles") / "connector/model.safetensors")
    assert connector["image_newline"].shape == (32,)
    before = load_file(project.model("pretrain") / "connector/model.safetensors")
    assert {f"inner.{name}" for name in before} == connector.keys() - {"image_newline"}
    assert image_mode(model_of(project, "tiles")) == "anyres" and load_model(model_of(project, "tiles"), []).model.tiled
    with pytest.raises(ConfigError, match="end in a newline to be learned"):
        train(project, *words, "recipe.stages.finetune.tune.connector=frozen")


def test_custom_finetune_goes_on_from_a_run_on_ones_own_data(project: Project, lora: Path, mine: Path) -> None:
    """The model is the lora run's: its adapter is merged, and a new one sits on the merged weights."""
    words = [*own_data(project), "eval=none", "launch.micro_batch=4", "tracking.log_steps=1", "name=custom"]
    words += ["recipe.stages.finetune.precision=fp32", "recipe.stages.finetune.max_steps=2", *RANK]
    assert run(["recipe=custom_finetune", "recipe.from_model=lora", *words]) == 0
    assert list(stages(project, "custom")) == ["images[finetune]", "prepare[finetune]", "finetune"]
    model = model_of(project, "custom")
    start = load_model(lora, []).model
    base = load_file(model / "llm/model.safetensors")
    assert torch.equal(base["model.layers.0.mlp.up_proj.weight"], start.llm.model.layers[0].mlp.up_proj.weight)
    assert (model / "vision_tower/model.safetensors").samefile(lora / "vision_tower/model.safetensors")

    # in a folder of the user's it has the same content, so the same result, and nothing is run
    assert run(["recipe=custom_finetune", "recipe.from_model=mine", *words, "name=copy"]) == 0
    assert set(stages(project, "copy").values()) == {"reused"}


def test_a_model_of_the_users_is_copied_not_linked(project: Project, mine: Path) -> None:
    words = [*own_data(project), "recipe=custom_finetune", "recipe.from_model=mine", "eval=none", "seed=9", *RANK]
    words += ["recipe.stages.finetune.precision=fp32", "recipe.stages.finetune.max_steps=1", "name=outside"]
    assert run(words) == 0
    part = "vision_tower/model.safetensors"
    assert (model_of(project, "outside") / part).read_bytes() == (mine / part).read_bytes()
    assert not (model_of(project, "outside") / part).samefile(mine / part)


@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_a_stopped_training_of_adapters_goes_on_bit_for_bit(
    project: Project, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is at work (0.05), so the states of the random generators count too."""
    words = [
        "recipe.stages.pretrain.max_steps=2",
        "recipe.stages.finetune.max_steps=5",
        *(QRANK, RANK)[recipe == "lora"],
    ]
    assert train(project, f"recipe={recipe}", *words, f"name=whole-{recipe}") == 0
    shutil.copytree(project.store, tmp_path / "store", ignore=shutil.ignore_patterns("runs"))
    whole = model_of(project, f"whole-{recipe}")
    shutil.rmtree(tmp_path / "store/stages" / whole.parents[1].name)
    words.append("name=again")
    monkeypatch.setenv("TINYLMM_STORE", str(tmp_path / "store"))
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_requested", lambda: next(asked, True))
        assert train(project, f"recipe={recipe}", *words) == 75
    (checkpoint,) = (tmp_path / "store").rglob("checkpoint-3")
    saved = load_file(checkpoint / "state-00001-of-00001.safetensors")
    assert {name.rpartition("/")[2] for name in saved} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all("lora_" in name or name.startswith("connector.") for name in saved)
    assert train(project, f"recipe={recipe}", *words) == 0
    again = tmp_path / "store/stages" / whole.parents[1].name / "output/model"
    assert folder_bytes(again) == folder_bytes(whole)
