"""Every shipped tower, its real classes at tiny size: what it reads, runs, trains and saves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from tests import builders
from tests.builders import LLAMA, WIDTH, describe, tiny_tokenizer, tuning
from tests.unit.models.llms import choice
from tinylmm.config.groups import conf_folder
from tinylmm.config.identities import TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.config.targets import resolve_target
from tinylmm.errors import ConfigError
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model
from tinylmm.models.encoders import find_anatomy, get_blocks
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower, encode_images, make_tower
from tinylmm.training.features import open_features

SIZE, PATCH, SIDE = 16, 4, 4
SHRUNK = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
NAMES = sorted(path.stem for path in (conf_folder() / "vision_tower").glob("*.yaml") if path.stem != "hf")
OUTPUT = ("select_layer", "select", "drop_first_token", "options")
DEFAULTS = {"drop_first_token": False, "options": {}}
LLM = {"_target_": "transformers.LlamaForCausalLM", "init": "random", "architecture": LLAMA}
MLP = {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}}
MOF_MLP = {"_target_": "tinylmm.models.connectors.MoFMLPConnector", "options": {}}
PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def shrunk(name: str) -> dict[str, Any]:
    """The YAML's identity with random weights, a few blocks, and images of 16 pixels in patches of 4."""
    identity = copy.deepcopy(choice(name, "vision_tower"))
    for architecture in [
        identity["architecture"],
        *(v for v in identity["architecture"].values() if isinstance(v, dict)),
    ]:
        if "hidden_size" in architecture:
            # DINOv2 keeps positions for images larger than its input, as its published checkpoint does.
            architecture |= {**SHRUNK, "image_size": SIZE + 2 * PATCH if "mlp_ratio" in architecture else SIZE}
    identity["image"] |= {"size": SIZE, **({"short_edge": SIZE + 2} if "short_edge" in identity["image"] else {})}
    return identity | {"init": "random"}


def build(identity: dict[str, Any], connector: dict[str, Any] = MLP, **output: Any) -> LMM:
    tower_output = DEFAULTS | {key: identity[key] for key in OUTPUT if key in identity} | output
    spec = {"llm": LLM, "vision_tower": identity, "connector": connector, "tower_output": tower_output}
    return builders.build(spec)


def encoders(tower: HFVisionTower) -> list[tuple[str, nn.Module]]:
    if type(tower).__name__ == "MoFTower":
        return [("clip.", tower.encoder.clip), ("dinov2.", tower.encoder.dinov2)]
    return [("", tower.encoder)]


def unused(tower: HFVisionTower) -> list[list[nn.Module]]:
    return list(tower._unused.values()) if type(tower).__name__ == "MoFTower" else [tower._unused_blocks]


def run_of(encoder: nn.Module) -> nn.ModuleList:
    return get_blocks(encoder, find_anatomy(encoder))


def whole(tower: HFVisionTower, prefix: str, encoder: nn.Module) -> nn.Module:
    """A fresh encoder of transformers with all blocks, loaded with what the tower would save."""
    state = {k.removeprefix(prefix): v for k, v in tower.whole_encoder_state().items() if k.startswith(prefix)}
    fresh = type(encoder)(encoder.config).eval()
    fresh.load_state_dict(state)
    return fresh


def num_prefix(encoder: nn.Module) -> int:
    kind = type(encoder).__name__
    return 0 if kind.startswith("Siglip") else 1 + getattr(encoder.config, "num_register_tokens", 0)


def renormalised(pixels: torch.Tensor, image: dict[str, Any]) -> torch.Tensor:
    mean, std = (torch.tensor(image[key]).view(3, 1, 1) for key in ("mean", "std"))
    imagenet_mean, imagenet_std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels * std + mean - imagenet_mean.view(3, 1, 1)) / imagenet_std.view(3, 1, 1)


@pytest.mark.parametrize("layer", [-2, -1, 0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_patches_of_transformers_own_hidden_state(name: str, layer: int) -> None:
    identity = shrunk(name)
    tower = build(identity, select_layer=layer).vision_tower.eval()
    expected = []
    for prefix, encoder in encoders(tower):
        pixels = renormalised(PIXELS, identity["image"]) if prefix == "dinov2." else PIXELS
        hidden = whole(tower, prefix, encoder)(pixels, output_hidden_states=True).hidden_states
        expected.append(hidden[layer][:, num_prefix(encoder) :])
    features = tower(PIXELS)
    assert features.shape == (2, tower.num_tokens, tower.hidden_size)
    assert tower.num_tokens == SIDE * SIDE * len(expected)
    for number, one in enumerate(expected):  # a mixture's are interleaved
        torch.testing.assert_close(features[:, number :: len(expected)], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_behind_the_tapped_layer_is_run(name: str) -> None:
    tower = build(shrunk(name)).vision_tower
    called: set[int] = set()
    blocks = [block for part in unused(tower) for block in part]
    watched = {id(module): module for module in [*tower.encoder.modules(), *blocks]}
    for module in watched.values():
        module.register_forward_pre_hook(lambda module, _: called.add(id(module)) or None)
    tower(PIXELS)
    assert len(blocks) == len(encoders(tower))
    assert not called & {id(block) for block in blocks}
    tails = ("post_layernorm", "layernorm", "norm", "head")  # SigLIP's and CLIP's, DINOv2's, DINOv3's
    assert not called & {id(getattr(encoder, tail, None)) for _, encoder in encoders(tower) for tail in tails}
    run = {id(block) for _, encoder in encoders(tower) for block in run_of(encoder)}
    assert run and run <= called


@pytest.mark.parametrize("tune", ["full", {"from_layer": 1}, {"from_layer": 0.34}, "frozen"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_step_gives_gradients_to_exactly_what_is_trained(name: str, tune: Any) -> None:
    model = build(shrunk(name)).train()
    report = tuning(model, {"llm": "frozen", "vision_tower": tune, "connector": "full"})
    model.train()
    tokens = torch.tensor([[-200] * model.image_tokens + [5, 6, 7]])
    targets = torch.tensor([[-100] * model.image_tokens + [6, 7, 2]])
    model(tokens, torch.arange(tokens.shape[1])[None], targets, pixel_values=PIXELS[:1]).loss_sum.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trained
    of_tower = {n for n in trained if n.startswith("vision_tower.")}
    assert bool(of_tower) == (tune != "frozen") == (report["vision_tower"].trained > 0)
    assert model.vision_tower.training == bool(of_tower)
    if isinstance(tune, dict):  # block 1 of 0 and 1, of every encoder
        parts = {next(part for part in n.split(".") if part.isdigit()) for n in of_tower}
        assert parts == {"1"} and all(any(prefix in n for n in of_tower) for prefix, _ in encoders(model.vision_tower))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tower_is_whole_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    identity = shrunk(name)
    model = build(identity, MOF_MLP if name == "mof" else MLP).eval()
    tower_output = DEFAULTS | {key: identity[key] for key in OUTPUT if key in identity}
    description = describe(
        {"llm": LLM, "vision_tower": identity}, tower_output, MOF_MLP if name == "mof" else MLP, "llama"
    )
    save_model(LoadedModel(model, tiny_tokenizer(), description, None), tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", [])
    before, after = model.vision_tower.whole_encoder_state(), again.model.vision_tower.whole_encoder_state()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert sum(".2." in key for key in after) > 0, "the block that is not run"
    assert torch.equal(again.model.eval().image_embeddings(PIXELS, None), model.image_embeddings(PIXELS, None))
    assert again.description == description


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_changes_the_features_no_more_than_its_rounding(name: str) -> None:
    tower = build(shrunk(name)).vision_tower.eval()
    exact = encode_images(tower, PIXELS)
    half = encode_images(tower.to(torch.bfloat16), PIXELS)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["mof", "dinov2", "dinov3"])
def test_cached_features_are_what_the_tower_gives(name: str, tmp_path: Path) -> None:
    tower = build(shrunk(name)).vision_tower.eval()
    pixels = dict(zip("ab", PIXELS, strict=True))
    cache = open_features(tower, ["a", "b"], pixels.__getitem__, str, tmp_path / "features", tmp_path / "scratch", {})
    assert torch.equal(cache(["b", "a"]), encode_images(tower, PIXELS)[[1, 0]])


def test_select_all_keeps_cls_and_registers() -> None:
    for name, extra in (("clip", 1), ("dinov2", 1), ("dinov3", 5), ("siglip", 0)):
        tower = build(shrunk(name), select="all").vision_tower
        assert tower.num_tokens == SIDE * SIDE + extra and tower(PIXELS).shape[1] == tower.num_tokens
        dropped = build(shrunk(name), drop_first_token=True).vision_tower
        assert dropped.num_tokens == SIDE * SIDE - 1
        torch.testing.assert_close(dropped(PIXELS), tower(PIXELS)[:, extra + 1 :])


def test_a_frozen_tower_gives_the_same_features_in_training_mode() -> None:
    """DINOv3 stretches its positions at random in training mode: meant for its own pretraining, not for a tower."""
    for tune in ("frozen", "full"):
        model = build(shrunk("dinov3"))
        tuning(model, {"llm": "frozen", "vision_tower": tune, "connector": "full"})
        model.train()
        assert torch.equal(model.vision_tower(PIXELS), model.vision_tower(PIXELS))


def test_mof_by_the_reference_hands_dinov2_clips_normalisation() -> None:
    identity = shrunk("mof")
    own, reference = (build(identity, options={"reference": flag}).vision_tower.eval() for flag in (False, True))
    torch.testing.assert_close(own(PIXELS)[:, 0::2], reference(PIXELS)[:, 0::2])
    odd = whole(reference, "dinov2.", reference.encoder.dinov2)(PIXELS, output_hidden_states=True).hidden_states[-2][
        :, 1:
    ]
    torch.testing.assert_close(reference(PIXELS)[:, 1::2], odd, atol=1e-5, rtol=1e-4)
    assert (own(PIXELS)[:, 1::2] - odd).abs().max() > 1e-3


def test_mof_loads_two_published_checkpoints(tmp_path: Path) -> None:
    made = build(shrunk("mof")).vision_tower
    for prefix, encoder in encoders(made):
        whole(made, prefix, encoder).save_pretrained(tmp_path / prefix.strip("."))
    identity = shrunk("mof") | {
        "init": "pretrained",
        "pretrained": f"{tmp_path}/clip+{tmp_path}/dinov2",
        "revision": None,
    }
    loaded = build(identity).vision_tower.eval()
    assert torch.equal(loaded(PIXELS), made.eval()(PIXELS))
    with pytest.raises(ConfigError, match="names no two encoders"):
        build(identity | {"pretrained": "org/one"})


def test_mof_refuses_encoders_that_do_not_match() -> None:
    identity = shrunk("mof")
    identity["architecture"]["dinov2"]["hidden_size"] = 32
    with pytest.raises(ConfigError, match=r"equal width, but CLIP's is 24 and DINOv2's 32"):
        build(identity)
    with pytest.raises(ConfigError, match="interleaves patches; set select=patch"):
        build(shrunk("mof"), select="all")


def hub_identity(folder: Path) -> dict[str, Any]:
    image = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash", "resample": "bicubic"}
    yaml_fields = yaml.safe_load((conf_folder() / "vision_tower" / "hf.yaml").read_text(encoding="utf-8"))
    return yaml_fields | {"pretrained": str(folder), "image": image}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (transformers.ViTConfig(**SHRUNK, image_size=SIZE), 16),
        (transformers.Dinov2WithRegistersConfig(**SHRUNK, image_size=SIZE, num_register_tokens=2), 16),
        (transformers.CLIPVisionConfig(**SHRUNK, image_size=SIZE), 16),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_hf_reads_whatever_encoder_a_checkpoint_names(config: Any, tokens: int, tmp_path: Path) -> None:
    published = transformers.AutoModel.from_config(config).eval()
    published.save_pretrained(tmp_path / "hub")
    identity = hub_identity(tmp_path / "hub")
    model = build(identity).eval()
    assert model.vision_tower.num_tokens == tokens and type(model.vision_tower.encoder) is type(published)
    hidden = published(PIXELS, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.vision_tower(PIXELS), hidden[:, num_prefix(published) :], atol=1e-5, rtol=1e-4)
    tower_output = DEFAULTS | {key: identity[key] for key in OUTPUT if key in identity}
    description = describe({"llm": LLM, "vision_tower": identity}, tower_output, MLP, "llama")
    save_model(LoadedModel(model, tiny_tokenizer(), description, None), tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", []).model.eval()
    assert torch.equal(again.image_embeddings(PIXELS, None), model.image_embeddings(PIXELS, None))


def test_hf_refuses_what_it_cannot_read_and_another_normalisation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ConfigError, match=r"model_type 'resnet'; vision_tower=hf reads clip"):
        build(hub_identity(tmp_path))
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ConfigError, match=r"set vision_tower.image.mean=\[0.5, 0.4, 0.3\]"):
        build(hub_identity(tmp_path))
    with pytest.raises(ConfigError, match="HubEncoder stands for whatever class"):
        build(hub_identity(tmp_path) | {"init": "random"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", {"size": 20}, "image.size is 20, but CLIPVisionModel takes 16 pixels alone; set 16"),
        ("dinov3", {"size": 18}, "image.size is 18, no multiple of the encoder's patches of 4 pixels"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    identity = shrunk(name)
    identity["image"] |= change
    with pytest.raises(ConfigError, match=message):
        build(identity)


def test_naflex_encoders_are_refused_with_what_to_take() -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="take the fixed-resolution checkpoint"):
        HFVisionTower(transformers.Siglip2VisionModel(config), -1, "patch", False)


def test_the_llm_width_is_what_the_connector_was_built_for() -> None:
    model = build(shrunk("mof"), MOF_MLP)
    assert model.image_embeddings(PIXELS, None).shape == (2, 2 * SIDE * SIDE, WIDTH)
    with pytest.raises(ConfigError, match=r"takes tokens of 2 encoders, but this tower has one. Set vision_tower=mof"):
        build(shrunk("clip"), MOF_MLP)


WIDTHS = {
    "clip_b16": 768,
    "siglip": 1152,
    "siglip2": 1152,
    "siglip2_base": 768,
    "nano": 96,
    "nano_small": 48,
    "nano_video": 96,
}
PUBLISHED = {  # tokens an image, millions of parameters of the image encoder as their model cards and papers give them
    "clip": (576, 304), "clip_224": (256, 304), "clip_b16": (196, 86), "siglip": (729, 428), "siglip2": (729, 428),
    "siglip2_base": (196, 93), "dinov2": (256, 304), "dinov3": (196, 300), "mof": (512, 608), "nano": (4, 0.63),
    "nano_small": (4, 0.1785), "nano_video": (4, 0.63),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_at_its_published_size_a_tower_has_the_published_shape(name: str) -> None:
    identity = copy.deepcopy(choice(name, "vision_tower"))
    encoder_class = resolve_target(identity["encoder"], (), transformers.PreTrainedModel, "encoder")
    with torch.device("meta"):
        config = encoder_class.config_class(**identity["architecture"])
        encoder = encoder_class(config)
    unknown = [key for key in identity["architecture"] if not hasattr(config, key)]
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    output = DEFAULTS | {key: identity[key] for key in OUTPUT if key in identity}
    tower_class = resolve_target(identity["_target_"], (), nn.Module, "vision_tower")
    tower = make_tower(tower_class, encoder, TowerOutput(**output), ImageSpec(**identity["image"]))
    tokens, millions = PUBLISHED[name]
    assert not unknown and tower.num_tokens == tokens and tower.hidden_size == WIDTHS.get(name, 1024)
    assert parameters == pytest.approx(millions, rel=0.03)
