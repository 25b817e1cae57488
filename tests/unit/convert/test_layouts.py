"""Each foreign layout comes in whole, and answers with the logits that its own tool would give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from tests.builders import tiny_tokenizer
from tests.foreign import (
    Foreign,
    factory_config,
    factory_tensors,
    foreign,
    llava_config,
    llava_tensors,
    load_imported,
    lora_pair,
    our_logits,
    part_config,
    write_base,
    write_factory_folders,
    write_json,
    write_merged,
    write_pickle,
)
from tinylmm.convert.configs import flat_llm_config, known_tower, known_tower_config
from tinylmm.convert.parts import build_part
from tinylmm.convert.source import open_source
from tinylmm.convert.tokenizer import choose_template
from tinylmm.errors import DataError, UserError
from tinylmm.models.checkpoint import LoadedModel

BEFORE, AFTER = [5, 6, 7], [8, 9, 10, 11]


def same_logits(parts: Foreign, loaded: LoadedModel) -> None:
    pixels = torch.randn(1, 3, 16, 16)
    expected, found = parts.logits(BEFORE, pixels, AFTER), our_logits(loaded, BEFORE, pixels, AFTER)
    assert expected.shape == found.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_factorys_three_folders_give_its_728_token_model_and_say_what_was_assumed(tmp_path: Path) -> None:
    parts = foreign(tied=True)  # a tied head is absent from the Factory's files
    write_factory_folders(tmp_path / "factory", parts)
    loaded, report = load_imported(tmp_path / "factory", tmp_path / "model")
    same_logits(parts, loaded)
    assert report.layout == "factory-folders"
    assert loaded.description.vision_tower.drop_first_token is True
    assert loaded.model.image_tokens == 3  # four patches, one cut
    assert loaded.model.llm.lm_head.weight is loaded.model.llm.model.embed_tokens.weight
    assert loaded.description.as_json()["image"] == {
        "size": 16,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "mode": "squash",
        "resample": "bicubic",
    }
    assert any("template" in note and "'llama'" in note for note in report.notes)
    assert any("preprocessing" in note for note in report.notes)


def test_the_published_layout_comes_in_without_running_its_code(tmp_path: Path) -> None:
    parts = foreign()
    source, witness = tmp_path / "published", tmp_path / "witness"
    auto_map = {"AutoConfig": "configuration.TinyLlavaConfig", "AutoModelForCausalLM": "modeling_tinyllava_phi.Model"}
    write_merged(source, factory_config(parts, auto_map=auto_map), factory_tensors(parts))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    write_json(
        source / "tokenizer_config.json", settings | {"auto_map": {"AutoTokenizer": [None, "tokenization.Tokenizer"]}}
    )
    for name in ("configuration.py", "modeling_tinyllava_phi.py", "tokenization.py"):
        (source / name).write_text(f"open({str(witness)!r}, 'w').close()\n")
    loaded, report = load_imported(source, tmp_path / "model")
    same_logits(parts, loaded)
    assert report.layout == "factory" and not witness.exists()


def test_a_merged_factory_model_keeps_its_dtype_and_padding_mode(tmp_path: Path) -> None:
    parts = foreign("clip")
    tensors = {k: v.half() for k, v in factory_tensors(parts).items()}
    config = factory_config(parts, image_aspect_ratio="pad", torch_dtype="float16")
    write_merged(tmp_path / "merged", config, tensors, pickled=True)
    loaded, _ = load_imported(tmp_path / "merged", tmp_path / "model")
    assert loaded.description.image.mode == "pad" and loaded.description.vision_tower.drop_first_token is False
    for name, tensor in loaded.model.llm.state_dict().items():
        assert torch.equal(tensor.half(), tensors[f"language_model.{name}"]), name
    assert (tmp_path / "model/llm/model.safetensors").stat().st_size < 100_000  # fp32 would be 158 kB


def test_a_factory_lora_run_is_merged_for_llm_and_tower(tmp_path: Path) -> None:
    parts = foreign(tied=True)
    write_factory_folders(tmp_path / "lora", parts, base_layer=True)
    merged = factory_tensors(parts)
    targets = ["language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.1.mlp.down_proj"]
    targets.append("vision_tower._vision_tower.vision_model.encoder.layers.0.self_attn.v_proj")
    adapter = lora_pair(targets, merged)
    write_pickle(tmp_path / "lora/adapter_model.bin", adapter)
    write_json(tmp_path / "lora/adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    with torch.no_grad():
        for target in targets:
            a, b = (adapter[f"base_model.model.{target}.lora_{side}.weight"] for side in "AB")
            root, _, name = target.partition(".")
            module = parts.llm if root == "language_model" else parts.encoder
            name = name.removeprefix("_vision_tower.vision_model.")
            module.get_submodule(name).weight += 2.0 * b @ a
    loaded, report = load_imported(tmp_path / "lora", tmp_path / "model")
    same_logits(parts, loaded)
    assert report.layout == "factory-lora" and any("rank 4" in note for note in report.notes)


def test_a_bench_model_comes_in_with_a_block_less_and_all_its_tokens(tmp_path: Path) -> None:
    parts = foreign(skip=0, llm="phi")
    nn.init.zeros_(parts.llm.lm_head.bias)
    tensors = llava_tensors(parts)
    last = "model.vision_tower.vision_tower.vision_model."
    for name in [
        k for k in tensors if k.startswith((f"{last}encoder.layers.2.", f"{last}head.")) or k == "lm_head.bias"
    ]:
        del tensors[name]  # Bench deletes the last block and the pooling head; its Phi head has no bias
    config = llava_config(parts, "tiny_llava_phi", mm_vision_tower="bczhou/TinyLLaVA-3.1B-SigLIP")
    write_merged(tmp_path / "bench", config, tensors)
    tower = tmp_path / "tower"
    write_json(tower / "config.json", part_config(parts.encoder))
    tiny = tiny_tokenizer()
    loaded, report = load_imported(tmp_path / "bench", tmp_path / "model", tower=tower)
    same_logits(parts, loaded)
    assert report.layout == "bench" and loaded.model.image_tokens == 4
    assert loaded.description.image.mode == "pad" and loaded.tokenizer.get_vocab() == tiny.get_vocab()
    assert any("2 of 3 blocks" in note for note in report.notes) and any("bias" in note for note in report.notes)


def test_llava_comes_in_whole_or_with_its_tower_from_a_base_folder(tmp_path: Path) -> None:
    parts = foreign("clip")
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.image_newline": torch.ones(32)}
    write_merged(tmp_path / "whole", llava_config(parts), {**llava_tensors(parts), **buffers})
    tower = write_base(tmp_path / "clip", parts.encoder, {**parts.tower_tensors(), "logit_scale": torch.ones(1)})
    loaded, report = load_imported(tmp_path / "whole", tmp_path / "a", tower=tower)
    same_logits(parts, loaded)
    assert set(report.ignored) == set(buffers)
    write_merged(tmp_path / "bare", llava_config(parts), llava_tensors(parts, tower=False))
    with pytest.raises(UserError, match=r"does not hold its vision tower.*--tower FOLDER"):
        load_imported(tmp_path / "bare", tmp_path / "b")
    loaded, report = load_imported(tmp_path / "bare", tmp_path / "b", tower=tower)
    same_logits(parts, loaded)
    assert report.layout == "llava" and any("base part" in note for note in report.notes)


def test_a_llava_projector_joins_its_base_parts(tmp_path: Path) -> None:
    parts = foreign("clip")
    write_json(tmp_path / "projector/config.json", llava_config(parts))
    write_pickle(
        tmp_path / "projector/mm_projector.bin",
        {f"model.mm_projector.{k}": v for k, v in parts.connector_tensors().items()},
    )
    tower = write_base(tmp_path / "clip", parts.encoder, parts.tower_tensors())
    llm = write_base(tmp_path / "llm", parts.llm, parts.llm_tensors(), tokenizer=True)
    loaded, report = load_imported(tmp_path / "projector", tmp_path / "model", llm=llm, tower=tower)
    same_logits(parts, loaded)
    assert report.layout == "llava-projector"
    with pytest.raises(UserError, match=r"does not hold its language model.*--llm FOLDER"):
        load_imported(tmp_path / "projector", tmp_path / "other", tower=tower)


def test_llavas_lora_and_its_other_trainables_are_merged_onto_the_base(tmp_path: Path) -> None:
    parts = foreign("clip")
    tower = write_base(tmp_path / "clip", parts.encoder, parts.tower_tensors())
    llm = write_base(tmp_path / "llm", parts.llm, parts.llm_tensors(), tokenizer=True)
    write_json(tmp_path / "lora/config.json", llava_config(parts))
    targets = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    adapter = lora_pair(targets, parts.llm_tensors())
    write_pickle(tmp_path / "lora/adapter_model.bin", adapter)
    write_json(
        tmp_path / "lora/adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    )
    others = {f"base_model.model.model.mm_projector.{k}": v for k, v in parts.connector_tensors().items()}
    write_pickle(tmp_path / "lora/non_lora_trainables.bin", others)
    with torch.no_grad():
        for target in targets:
            a, b = (adapter[f"base_model.model.{target}.lora_{side}.weight"] for side in "AB")
            parts.llm.get_submodule(target).weight += (8 / 4**0.5) * b @ a
    loaded, report = load_imported(tmp_path / "lora", tmp_path / "model", llm=llm, tower=tower)
    same_logits(parts, loaded)
    assert report.layout == "llava-lora"


@pytest.mark.parametrize("scheme", ["old", "new"])
def test_transformers_llava_comes_in_by_both_key_schemes(tmp_path: Path, scheme: str) -> None:
    parts = foreign("clip")
    names = {"0": "linear_1", "2": "linear_2"}
    projector = {f"multi_modal_projector.{names[k[0]]}{k[1:]}": v for k, v in parts.connector_tensors().items()}
    llm, tower = parts.llm_tensors(), parts.tower_tensors()
    if scheme == "old":
        tensors = {f"language_model.{k}": v for k, v in llm.items()} | {
            f"vision_tower.{k}": v for k, v in tower.items()
        }
        tensors |= projector
    else:
        tensors = {
            f"model.language_model.{k.removeprefix('model.')}": v for k, v in llm.items() if k.startswith("model.")
        }
        tensors |= {"lm_head.weight": llm["lm_head.weight"]} | {f"model.vision_tower.{k}": v for k, v in tower.items()}
        tensors |= {f"model.{k}": v for k, v in projector.items()}
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": part_config(parts.llm),
        "vision_config": part_config(parts.encoder),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "image_token_index": 319,
    }
    write_merged(tmp_path / "hf", config, tensors)
    loaded, report = load_imported(tmp_path / "hf", tmp_path / "model", template="llama")
    same_logits(parts, loaded)
    assert report.layout == "transformers" and loaded.model.image_tokens == 4 and not report.ignored


def test_a_missing_base_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SOURCE: .*nowhere is no folder"):
        load_imported(tmp_path / "nowhere", tmp_path / "model")


def test_the_llms_own_template_is_preferred_among_those_with_its_end_token(tmp_path: Path) -> None:
    source = open_source(tmp_path, None, None, None)
    tokenizer = tiny_tokenizer()
    assert choose_template(source, tokenizer, "llama") == "llama" and "'llama'" in source.notes[0]
    tokenizer.eos_token = "<|endoftext|>"
    assert choose_template(source, tokenizer, "phi") == "phi"
    tokenizer.eos_token = "<odd>"
    with pytest.raises(UserError, match=r"none of the family's ends answers with '<odd>'.*--template"):
        choose_template(source, tokenizer, "phi")
    source.template = "plain"
    assert choose_template(source, tokenizer, "phi") == "plain"


def test_configs_of_the_time_mean_the_same_today() -> None:
    phi = flat_llm_config(
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.4,
            "rope_theta": 5000.0,
            "mm_hidden_size": 9,
            "resid_pdrop": 0.1,
        },
        "phi",
    )
    assert (phi.hidden_size, phi.resid_pdrop) == (64, 0.1) and not hasattr(phi, "mm_hidden_size")
    assert phi.rope_parameters["partial_rotary_factor"] == 0.4 and phi.rope_parameters["rope_theta"] == 5000.0
    epoch = {"rope_pct": 0.25, "norm_eps": 1e-5, "use_qkv_bias": True, "hidden_size": 64, "rotary_scaling_factor": 1.0}
    stablelm = flat_llm_config(epoch, "stablelm")
    assert stablelm.use_qkv_bias and stablelm.layer_norm_eps == 1e-5
    assert stablelm.rope_parameters["partial_rotary_factor"] == 0.25
    assert known_tower("bczhou/TinyLLaVA-3.1B-SigLIP") == known_tower("google/siglip-so400m-patch14-384")
    clip = known_tower_config("openai/clip-vit-large-patch14-336")
    assert clip is not None and clip.model_type == "clip_vision_model" and clip.num_hidden_layers == 24
    assert known_tower("someone/else") is None


def test_names_that_transformers_has_changed_since_are_its_own_to_translate() -> None:
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    encoder = Dinov2Model(config)
    new = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    old = {re.sub(r"attention\.([qkv])_proj", r"attention.attention.\1", name): tensor for name, tensor in new.items()}
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
        old = {
            name.replace(f"attention.attention.{short}.", f"attention.attention.{long}."): t for name, t in old.items()
        }
    old = {name.replace("attention.o_proj", "attention.output.dense"): tensor for name, tensor in old.items()}
    assert set(old) != set(new)
    loaded = build_part("vision tower", Dinov2Model, config, old, "test")
    assert all(torch.equal(tensor, new[name]) for name, tensor in loaded.state_dict().items())
    del old["encoder.layer.1.attention.attention.query.weight"]
    with pytest.raises(UserError, match="missing"):
        build_part("vision tower", Dinov2Model, config, old, "test")
