"""What is trained gets gradients, what is frozen gets none; adapters travel as peft folders and merge to what was trained."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaForCausalLM, SiglipVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from tests.builders import IMAGE_SIZE, WIDTH, folder_bytes, tiny_lmm, tiny_loaded, tiny_tower, tuning
from tinylmm.errors import IntegrityError, UserError
from tinylmm.models.adapters import adaptable_linears, merge_adapter
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model, save_part, write_merged
from tinylmm.models.connectors import IdentityConnector, LinearConnector, MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import connector_blocks, enable_checkpointing

PARTS = ("llm", "vision_tower", "connector")
FROZEN = dict.fromkeys(PARTS, "frozen")
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "bias": "none", "rslora": False}
NF4 = {"bits": 4, "quant_type": "nf4", "double_quant": True}
MODES: dict[str, Any] = {
    "frozen": "frozen",
    "full": "full",
    "from_layer": {"from_layer": 1},
    "lora": {"lora": LORA},
    "qlora": {"qlora": LORA | NF4},
}
TOKENS = torch.tensor([[-200] * 4 + [5, 6, 7, 8]])


def loss(model: LMM) -> torch.Tensor:
    torch.manual_seed(3)
    output = model(
        input_ids=TOKENS,
        position_ids=torch.arange(8)[None],
        targets=torch.tensor([[-100] * 4 + [6, 7, 8, 2]]),
        pixel_values=torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE),
    )
    return output.loss_sum


def move_adapters(model: LMM) -> None:
    """B starts at zero, and so do biases: nothing would be seen of an adapter. Give them values."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and name.endswith(".base_layer.bias")):
            nn.init.normal_(parameter, std=0.1)


def tuned(tune: dict[str, Any], loaded: LoadedModel | None = None) -> LMM:
    model = (loaded or tiny_loaded()).model.train()
    tuning(model, FROZEN | tune)
    move_adapters(model)
    return model


@pytest.mark.parametrize("llm", MODES)
def test_exactly_what_is_trained_gets_gradients_for_every_way_of_every_part(llm: str) -> None:
    for tower, connector in itertools.product(MODES, repeat=2):
        if {llm, tower, connector} == {"frozen"}:
            continue
        model = tuned({"llm": MODES[llm], "vision_tower": MODES[tower], "connector": MODES[connector]})
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for checkpointed in (False, True):
            if checkpointed:
                enable_checkpointing(model)
            model.zero_grad(set_to_none=True)
            loss(model).backward()
            present = {name for name, p in model.named_parameters() if p.grad is not None}
            moved = {name for name in present if model.get_parameter(name).grad.abs().sum() > 0}
            assert moved == present == trained, (tower, connector, checkpointed)
        for part, mode in (("llm", llm), ("vision_tower", tower), ("connector", connector)):
            names = [name for name in trained if name.startswith(f"{part}.")]
            assert bool(names) == (mode != "frozen")
            assert all("lora_" in name for name in names) == (mode in ("lora", "qlora", "frozen"))


@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_text_alone_through_a_frozen_llm_gives_zero_gradients_not_an_error(tower: str) -> None:
    model = tuned({"vision_tower": tower, "connector": "full"})
    ids = torch.arange(5, 13)[None]
    model(input_ids=ids, position_ids=torch.arange(8)[None], targets=ids).loss_sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_no_loss_and_reaches_a_trained_tower() -> None:
    model = tuned({"vision_tower": "full"})
    plain = loss(model)
    enable_checkpointing(model)
    assert torch.equal(loss(model), plain)
    assert model.vision_tower.blocks[0].gradient_checkpointing and model.llm.model.layers[0].gradient_checkpointing


def test_a_fraction_means_the_upper_part_of_the_whole_tower() -> None:
    model = tiny_lmm()
    report = tuning(model, FROZEN | {"vision_tower": {"from_layer": 0.34}})
    assert report["vision_tower"].mode == "from block 1 of 3"
    assert {n.split(".")[3] for n, p in model.vision_tower.named_parameters() if p.requires_grad} == {"1"}


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_tower_in_full_leaves_out_what_lies_behind_its_output(kind: str) -> None:
    tower = tiny_tower(kind)
    model = LMM(tiny_lmm().llm, tower, MLPConnector(tower.hidden_size, WIDTH), "llama")
    report = tuning(model, FROZEN | {"vision_tower": "full"})["vision_tower"]
    left = {name for name, p in tower.encoder.named_parameters() if not p.requires_grad}
    assert left and all(name.startswith(("post_layernorm.", "head.")) for name in left)
    assert report.trained == report.total - sum(tower.encoder.get_parameter(name).numel() for name in left)


class DINOTower(nn.Module):
    """A tower of another build: its blocks lie elsewhere, and parameters lie idle that no other kind has (`mask_token`)."""

    image_size, num_tokens, hidden_size, depth = IMAGE_SIZE, 5, 24, 2

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": IMAGE_SIZE}
        self.encoder = Dinov2Model(Dinov2Config(**sizes, patch_size=8))
        self.blocks = nn.ModuleList(block for block in self.encoder.modules() if isinstance(block, Dinov2Layer))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder.embeddings(pixel_values)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_partial_tuning_and_adapters_reach_a_tower_of_another_kind() -> None:
    reached = {}
    for name, tune in (("full", "full"), ("from_layer", {"from_layer": 0.5}), ("lora", {"lora": LORA})):
        tower = DINOTower()
        model = LMM(tiny_lmm().llm, tower, MLPConnector(24, WIDTH), "llama").train()  # type: ignore[arg-type]
        report = tuning(model, FROZEN | {"vision_tower": tune})
        move_adapters(model)
        model.connector(tower(torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE))).square().sum().backward()
        reached[name] = {id(p) for p in tower.parameters() if p.grad is not None and p.grad.any()}
        assert (
            reached[name] == {id(p) for p in tower.parameters() if p.requires_grad} and report["vision_tower"].trained
        )
        idle = {n for n, p in tower.encoder.named_parameters() if not p.requires_grad}
        assert name != "full" or idle == {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    assert len(reached["lora"]) == 2 * 2 * 6  # A and B on q, k, v, o, fc1, fc2 of two blocks


def test_a_connectors_blocks_are_its_layers_with_parameters() -> None:
    def linears(blocks: list[nn.Module]) -> list[list[nn.Module]]:
        return [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]

    connector = MLPConnector(24, WIDTH, depth=3)
    assert linears(connector_blocks(connector)) == [[m] for m in connector.modules() if isinstance(m, nn.Linear)]
    assert linears(connector_blocks(LinearConnector(24, WIDTH))) and not connector_blocks(IdentityConnector(8, 8))

    streams = nn.ModuleDict({name: MLPConnector(24, WIDTH).layers for name in ("clip", "dinov2")})
    pairs = [[streams["clip"][i], streams["dinov2"][i]] for i in (0, 2)]
    assert linears(connector_blocks(streams)) == pairs, "two streams go in step"

    deep = nn.ModuleDict(
        {
            "proj": nn.Linear(4, 4),
            "layers": nn.ModuleList(nn.Sequential(*map(nn.Linear, [4] * 3, [4] * 3)) for _ in "ab"),
        }
    )
    assert [len(found) for found in linears(connector_blocks(deep))] == [3, 3], (
        "outer blocks, not the layers inside one"
    )


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            {"vision_tower": {"from_layer": 2}},
            r"tune.vision_tower.from_layer is 2, but the part runs 2 blocks \(0 to 1\)",
        ),
        ({}, r"nothing of this model is left to train \(llm: frozen, vision_tower: frozen, connector: frozen\)"),
        (
            {"llm": {"lora": LORA | {"targets": ["qproj"]}}},
            "targets names qproj, but .* There are: .*q_proj.*all-linear",
        ),
    ],
    ids=["from_layer", "frozen", "targets"],
)
def test_what_cannot_be_trained_is_refused(tune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tuning(tiny_lmm(), FROZEN | tune)


def test_a_connector_without_weights_takes_no_adapter_and_is_nothing_to_train() -> None:
    lmm = tiny_lmm()
    tower = lmm.vision_tower
    model = LMM(lmm.llm, tower, IdentityConnector(tower.hidden_size, tower.hidden_size), "llama")
    with pytest.raises(UserError, match=r"tune.connector: the part has no linear layers"):
        tuning(model, FROZEN | {"connector": {"lora": LORA}})
    with pytest.raises(UserError, match=r"tune.connector: the part has no blocks"):
        tuning(model, FROZEN | {"connector": {"from_layer": 0}})
    with pytest.raises(UserError, match="nothing of this model is left to train"):
        tuning(model, FROZEN | {"connector": "full"})


def test_adapters_leave_the_output_head_alone_and_are_drawn_from_the_seed() -> None:
    first, again, other = (tiny_lmm() for _ in range(3))
    report = tuning(first, FROZEN | {"llm": {"lora": LORA}}, seed=1)
    torch.rand(7)  # whatever was drawn before
    tuning(again, FROZEN | {"llm": {"lora": LORA}}, seed=1)
    tuning(other, FROZEN | {"llm": {"lora": LORA}}, seed=2)
    assert report["llm"].mode == "adapters of rank 4 on 14 layers"  # 2 blocks of q, k, v, o, gate, up, down
    assert not any(name.startswith("lm_head") and "lora" in name for name, _ in first.llm.named_modules())
    name = "llm.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_close_small_and_never_trained(bits: int) -> None:
    whole, model = tiny_lmm(), tiny_lmm()
    tuning(model, FROZEN | {"llm": {"qlora": LORA | NF4 | {"bits": bits}}})
    layer = model.llm.model.layers[0].mlp.up_proj.base_layer
    linear = whole.llm.model.layers[0].mlp.up_proj
    assert layer.weight.numel() * layer.weight.element_size() == linear.weight.numel() * bits // 8
    assert not layer.weight.requires_grad
    torch.testing.assert_close(loss(model.train()), loss(whole), rtol=0.02, atol=0)


# ---------------------------------------------------------------------------------------------------- saved and merged


def saved(tmp_path: Path, tune: dict[str, Any]) -> tuple[LMM, Path]:
    """A model in training with adapters, and the folder it was saved to, as a train stage does it."""
    loaded = tiny_loaded()
    bases = {part: tmp_path / "bases" / part for part in tune}
    for part, folder in bases.items():
        save_part(loaded.model, part, folder)
    report = tuning(loaded.model.train(), FROZEN | tune)
    move_adapters(loaded.model)
    adapters = {part: report[part].adapter for part in tune if report[part].adapter is not None}
    save_model(loaded, tmp_path / "model", None, bases, adapters)  # type: ignore[arg-type]
    return loaded.model, tmp_path / "model"


@pytest.mark.parametrize("bits", [None, 4, 8], ids=["lora", "nf4", "int8"])
def test_a_saved_model_is_base_and_adapter_and_loads_as_what_was_trained(tmp_path: Path, bits: int | None) -> None:
    tune = {"lora": LORA} if bits is None else {"qlora": LORA | NF4 | {"bits": bits}}
    model, folder = saved(tmp_path, dict.fromkeys(PARTS, tune))
    assert (folder / "llm/model.safetensors").samefile(tmp_path / "bases/llm/model.safetensors")
    loaded = load_model(folder, [])
    rtol = 0.02 if bits == 8 else 1e-5  # 8-bit layers round their inputs too, and that is no matter of weights
    torch.testing.assert_close(loss(loaded.model.train()), loss(model), rtol=rtol, atol=0)
    assert set(loaded.model.state_dict()) == set(tiny_lmm().state_dict())
    assert loaded.description.adapters is None and set(loaded.adapters) == set(PARTS)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())

    write_merged(folder, tmp_path / "merged", [])
    assert not (tmp_path / "merged/adapters").exists()
    merged = load_model(tmp_path / "merged", [])
    assert torch.equal(loss(merged.model.train()), loss(loaded.model.train()))


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"targets": ("q_proj", "v_proj")}], ids=str)
def test_peft_alone_reads_the_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel

    _, folder = saved(tmp_path, {"llm": {"lora": LORA | settings}})
    base = LlamaForCausalLM.from_pretrained(folder / "llm")
    theirs = PeftModel.from_pretrained(base, str(folder / "adapters/llm"))
    ids = torch.arange(10, 20)[None]
    ours = load_model(folder, []).model.llm
    before = LlamaForCausalLM.from_pretrained(folder / "llm")(ids).logits
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert (ours(ids).logits - before).abs().max() > 0.01


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_peft_alone_reads_a_towers_adapter_and_its_biases(tmp_path: Path, bias: str) -> None:
    from peft import PeftModel

    model, folder = saved(tmp_path, {"vision_tower": {"lora": LORA | {"bias": bias}}})
    tensors = load_file(folder / "adapters/vision_tower/adapter_model.safetensors")
    assert any(name.endswith("bias") for name in tensors) == (bias != "none")
    assert not any("post_layernorm" in name or "layers.2" in name for name in tensors), "the loss does not reach them"
    pixels = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    loaded = load_model(folder, [])
    base = SiglipVisionModel.from_pretrained(folder / "vision_tower")
    theirs = PeftModel.from_pretrained(base, str(folder / "adapters/vision_tower"))
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(loaded.model.vision_tower(pixels), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss(loaded.model.train()), loss(model), rtol=1e-5, atol=0)


def test_an_adapter_of_a_part_that_the_next_stage_freezes_is_handed_on(tmp_path: Path) -> None:
    _, first = saved(tmp_path, {"llm": {"lora": LORA}})
    loaded = load_model(first, [])
    save_model(loaded, tmp_path / "next", None, {"llm": first / "llm"})
    assert folder_bytes(tmp_path / "next/adapters") == folder_bytes(first / "adapters")
    again = load_model(tmp_path / "next", [])
    assert torch.equal(loss(again.model.train()), loss(loaded.model.train()))


def test_saving_an_adapter_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    folders = [saved(tmp_path / name, {"llm": {"lora": LORA}})[1] for name in ("a", "b")]
    assert folder_bytes(folders[0]) == folder_bytes(folders[1])


def test_an_adapter_of_another_shape_of_model_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, {"llm": {"lora": LORA | {"targets": ["q_proj"]}}})
    config = folder / "adapters/llm/adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "k_proj"))
    with pytest.raises(IntegrityError, match=r"does not fit the llm it lies beside: 8 tensors"):
        load_model(folder, [])


def test_without_bitsandbytes_qlora_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'tinylmm\[qlora\]'"):
        tuning(tiny_lmm(), FROZEN | {"llm": {"qlora": LORA | NF4}})
    with pytest.raises(UserError, match=r"pip install 'tinylmm\[qlora\]'"):
        merge_adapter(tiny_lmm(), "llm", tmp_path, NF4)


def test_layers_inside_multihead_attention_take_no_adapter() -> None:
    model = tiny_lmm()
    model.connector.attention = nn.MultiheadAttention(WIDTH, 2)
    assert set(adaptable_linears(model, "connector")) == {"layers.0", "layers.2"}
    assert all(".layers." in name for name in adaptable_linears(model, "vision_tower"))


@pytest.mark.slow
def test_bitsandbytes_fetches_no_kernel_from_a_hub_where_it_could(tmp_path: Path) -> None:
    """The package `kernels` is there, and counts who asks it for code (on CPUs for which there is some)."""
    stub = "__version__ = '0.1'\ndef get_kernel(*_, **__):\n    raise SystemExit('asked for code from a hub')\n"
    (tmp_path / "kernels.py").write_text(stub)
    code = "import tinylmm.models.tuning, sys; import transformers.trainer_utils; assert 'bitsandbytes' in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
