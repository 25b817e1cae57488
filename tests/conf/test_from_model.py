"""A recipe that starts from a model takes the parts from its folder, and says so where a group was chosen that differs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.config.recipe import TuneHow
from tinylmm.config.spec import RunSpec
from tinylmm.errors import ConfigError
from tinylmm.planning.graph import build_graph
from tinylmm.planning.planner import plan_run

PARTS = ("llm", "vision_tower")
DATA = ("data.root=/data", "data.sources.finetune.annotations=mine.json")


def safetensors(content: bytes) -> bytes:
    """A whole file of weights: one tensor of these bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return len(header).to_bytes(8, "little") + header + content


def write_model(folder: Path, spec: RunSpec, weights: bytes = b"w") -> Path:
    """A model's folder as far as it is read without torch, of the parts of this spec."""
    tower = spec.vision_tower
    description: dict[str, Any] = {
        "model_type": "tinylmm",
        "format": 1,
        "llm": {"_target_": spec.llm.target},
        "vision_tower": {"_target_": tower.target, "encoder": tower.encoder}
        | tower.model_dump(mode="json", include={"select_layer", "select", "drop_first_token"}),
        "connector": {"_target_": spec.connector.target, "options": spec.connector.options},
        "image": tower.image.model_dump(mode="json"),
        "template": spec.llm.template,
    }
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        saved = getattr(spec, part).architecture | {"model_type": "kind", "architectures": ["X"], "dtype": "float32"}
        (folder / part / "config.json").write_text(json.dumps(saved))
        (folder / part / "model.safetensors").write_bytes(safetensors(weights))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def phi(tmp_path: Path) -> Path:
    return write_model(tmp_path / "phi", compose_run(["llm=phi2", "vt=siglip", "connector=linear", "eval=none"]))


def words(model: Path | str, *more: str) -> list[str]:
    return ["recipe=custom_finetune", f"recipe.from_model={model}", "eval=none", *DATA, *more]


def test_parts_template_and_numbers_are_the_models_not_the_defaults(phi: Path) -> None:
    spec = compose_run(words(phi))
    assert (spec.llm.target, spec.llm.template, spec.llm.pretrained) == (
        "transformers.PhiForCausalLM",
        "phi",
        str(phi / "llm"),
    )
    assert spec.vision_tower.image.size == 384 and spec.connector.target.endswith("LinearConnector")
    assert spec.llm.architecture["hidden_size"] == 2560 and "dtype" not in spec.llm.architecture
    stage = spec.recipe.stages["finetune"]
    tune = stage.tune.llm
    assert isinstance(tune, TuneHow) and tune.lora is not None and (tune.lora.r, tune.lora.alpha) == (128, 256)
    assert (stage.lr, stage.global_batch, stage.max_length, stage.precision) == (1e-4, 128, 3072, "bf16")
    assert spec.data.name == "custom"


def test_a_model_of_the_default_parts_keeps_the_numbers_of_their_scale(tmp_path: Path) -> None:
    spec = compose_run(words(write_model(tmp_path / "nano", compose_run([]))))
    assert spec.llm.name == "nano" and spec.llm.init == "pretrained" and spec.llm.build is None
    stage = spec.recipe.stages["finetune"]
    assert stage.precision == "fp32" and stage.lr == compose_run(["recipe=lora"]).recipe.stages["finetune"].lr


def test_a_group_chosen_in_words_must_agree(phi: Path) -> None:
    assert compose_run(words(phi, "llm=phi2")).llm.name == "phi2"
    with pytest.raises(ConfigError) as caught:
        compose_run(words(phi, "llm=tinyllama", "vt=clip", "vt.select_layer=-2"))
    assert [fault.where for fault in caught.value.faults] == ["llm", "vision_tower"]
    assert "_target_ is transformers.LlamaForCausalLM, the model's transformers.PhiForCausalLM" in str(caught.value)
    assert "Leave llm out" in str(caught.value)


def test_a_template_of_ones_own_wins(phi: Path) -> None:
    assert compose_run(words(phi, "llm.template=llama")).llm.template == "llama"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (["recipe=custom_finetune", *DATA], "recipe: starts from a model, so set recipe.from_model"),
        (
            words("nowhere"),
            "recipe.from_model: names no model: nowhere is neither .* name of a run .* Runs there: none",
        ),
        (
            ["recipe=base", "recipe.from_model={phi}", "data=digits"],
            "recipe: has from_model, but no stage starts from it",
        ),
        (["recipe=custom_finetune", "recipe.from_model={phi}", "eval=none"], r"data\.root: has no value"),
        (["recipe=qlora", "launch=zero3"], r"finetune.tune.llm: is qlora, whose .* ZeRO-3 cannot"),
        (
            ["recipe=lora", "recipe.stages.finetune.tune.llm={from_layer: 1}"],
            "llm: names from_layer and lora .* to null",
        ),
    ],
    ids=["unset", "nowhere", "unused", "no data", "zero3", "two ways"],
)
def test_what_is_missing_or_contradicts_is_told(recipe: list[str], message: str, phi: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([word.format(phi=phi) if "{phi}" in word else word for word in recipe])


def test_the_stage_is_identified_by_the_models_bytes_not_by_its_place(tmp_path: Path) -> None:
    nano = compose_run([])
    digests = {}
    for name, weights in (("a", b"w"), ("b", b"w"), ("c", b"v")):
        write_model(tmp_path / name, nano, weights)
        given = ["recipe=custom_finetune", f"recipe.from_model={tmp_path / name}", "data=digits", "eval=none"]
        plan = plan_run(compose_run(given), name)
        digests[name] = {stage.name: stage.digest for stage in plan.graph}
    assert set(digests["a"]) == {"digits", "images[finetune]", "prepare[finetune]", "finetune"}
    assert digests["a"] == digests["b"] != digests["c"]
    assert digests["a"]["prepare[finetune]"] == digests["c"]["prepare[finetune]"]


@pytest.mark.parametrize("parts", [[], ["llm=phi2", "vt=siglip", "eval=none"]], ids=["nano", "published"])
def test_every_recipe_begins_with_the_pretraining_of_base(parts: list[str]) -> None:
    digests = {}
    for recipe in ("base", "share", "share_factory", "full", "lora", "qlora", "bench", "share_bench"):
        graph = build_graph(compose_run([*parts, f"recipe={recipe}"]), NoFiles())
        digests[recipe] = {stage.name: stage.digest for stage in graph}
    assert len({stages["pretrain"] for stages in digests.values()}) == 1
    assert len({stages["finetune"] for stages in digests.values()}) == len(digests)


def test_adapter_recipes_carry_the_factorys_numbers() -> None:
    published = ["llm=phi2", "vt=siglip", "eval=none"]
    for name in ("lora", "qlora"):
        stage = compose_run([*published, f"recipe={name}"]).recipe.stages["finetune"]
        tune = stage.tune.llm
        assert isinstance(tune, TuneHow)
        adapter = getattr(tune, name)
        assert (adapter.r, adapter.alpha, adapter.dropout, adapter.bias) == (128, 256, 0.05, "none")
        assert (stage.lr, stage.global_batch, stage.max_length) == (2e-4, 128, 3072)
        assert (stage.tune.vision_tower, stage.tune.connector) == ("frozen", "full")


def test_share_factory_is_share_but_for_the_tower() -> None:
    words = ["llm=phi2", "vt=siglip", "eval=none"]
    share, factory = (compose_run([*words, f"recipe={name}"]).recipe.stages for name in ("share", "share_factory"))
    assert factory["share_pretrain"].tune.vision_tower == "frozen"
    whole = {name: stage.model_dump() for name, stage in share.items()}
    whole["share_pretrain"]["tune"]["vision_tower"] = "frozen"
    assert {name: stage.model_dump() for name, stage in factory.items()} == whole


@pytest.mark.parametrize(("recipe", "like"), [("bench", "base"), ("share_bench", "share")])
def test_the_benchs_recipes_square_images_first_and_pad_them_in_the_finetuning(recipe: str, like: str) -> None:
    """TinyLLaVABench's scripts: pretrain.sh has no image_aspect_ratio, finetune.sh has pad; 3,072 tokens."""
    bench, other = (compose_run(["llm=phi2", "vt=clip", "eval=none", f"recipe={name}"]) for name in (recipe, like))
    assert [bench.image_of(stage).mode for stage in bench.recipe.stages][:-1] == ["center_crop"] * (
        len(other.recipe.stages) - 1
    )
    assert bench.image_of("finetune").mode == "pad" and bench.recipe.stages["finetune"].max_length == 3072
    changes = {"image_mode": "auto", "max_length": 0}
    assert [stage.model_copy(update=changes) for stage in bench.recipe.stages.values()] == [
        stage.model_copy(update=changes) for stage in other.recipe.stages.values()
    ]


def test_a_scale_that_was_asked_for_holds_for_a_model_of_another_kind(phi: Path) -> None:
    stage = compose_run(words(phi, "llm.scale.lora.lr=0.5")).recipe.stages["finetune"]
    assert stage.lr == 0.5 and stage.global_batch == 128, "the rest is the recipe's own, not nano's"


def test_a_field_that_the_model_was_saved_without_is_refused(tmp_path: Path) -> None:
    nano = write_model(tmp_path / "nano", compose_run([]))
    with pytest.raises(
        ConfigError, match=r"llm\.architecture\.hiden_size: is set, but the model at .* was saved without it"
    ):
        compose_run(words(nano, "llm.architecture.hiden_size=32"))
