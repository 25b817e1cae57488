"""Every LLM of conf/llm, at tiny size: packing, loss, image features, saving, generation; and the published sizes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.builders import IMAGE, IMAGE_SIZE, describe, record, tiny_tokenizer
from tests.reference import generate
from tests.unit.models.llms import NAMES, VOCAB, choice, tiny, tiny_llm
from tinylmm.config.targets import resolve_target
from tinylmm.constants import IMAGE_TOKEN_ID as SLOT
from tinylmm.data.collate import Collator
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model
from tinylmm.models.llm import reconcile
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import decoder_blocks

every_llm = pytest.mark.parametrize("name", NAMES)
PIXELS = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))

PUBLISHED = {  # parameters of the released weights; a tied head counts once
    "gemma": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "gemma3_270m": 268_098_176,
    "openelm": 457_179_136,
    "openelm_1_1b": 1_079_891_456,
    "openelm_270m": 271_527_168,
    "openelm_3b": 3_036_647_424,
    "openelm_450m": 457_179_136,
    "phi2": 2_779_683_840,
    "qwen1_5": 1_836_828_672,
    "qwen1_5_0_5b": 463_987_712,
    "qwen2_0_5b": 494_032_768,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "smollm2_1_7b": 1_711_376_384,
    "smollm2_360m": 361_821_120,
    "stablelm2": 1_644_515_328,
    "tinyllama": 1_100_048_384,
}


@cache
def model_of(name: str) -> LMM:
    """One model a name; tests that change it take a copy."""
    return tiny(name)


def rows() -> list[dict[str, Any]]:
    """Three samples, two with images; each longer than a window, and the pad id (2 and 0) occurs as text."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in (9, 14, 7)]
    return [
        record("one", [1, SLOT, *ids[0], 2], 4, ("0",)),
        record("text", [1, *ids[1][:6], 2, 0, *ids[1][6:]], 9),
        record("two", [ids[2][0], SLOT, *ids[2][1:3], SLOT, *ids[2][3:]], 3, ("1", "2")),
    ]


def batch(model: LMM, samples: list[dict[str, Any]], packing: bool) -> dict[str, Any]:
    made = Collator(model.image_tokens, 3, 96, packing, lambda path: PIXELS[int(path)], 128)(samples)
    return {key: made[key] for key in ("input_ids", "position_ids", "targets", "pixel_values")}


def step(model: LMM, packing: bool) -> tuple[float, LMM]:
    """Loss, and the model after one step of gradient descent on it."""
    model = copy.deepcopy(model)  # in eval mode: dropout would draw differently
    inputs = batch(model, rows(), packing)
    assert inputs["input_ids"].shape[0] == (1 if packing else 3)
    output = model(**inputs)
    loss = output.loss_sum / output.num_supervised
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss.item(), model


@every_llm
def test_a_step_on_one_packed_row_equals_a_step_on_separate_rows(name: str) -> None:
    packed_loss, packed = step(model_of(name), packing=True)
    loss, separate = step(model_of(name), packing=False)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    before, after = dict(model_of(name).named_parameters()), dict(separate.named_parameters())
    for key, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter, after[key], rtol=1e-5, atol=1e-5)
    still = [key for key, parameter in after.items() if torch.equal(parameter, before[key])]
    assert all(key.startswith("vision_tower.encoder.") for key in still), "the step reached every part of the LLM"


@every_llm
def test_the_loss_is_that_of_the_models_own_logits(name: str) -> None:
    model = model_of(name)
    inputs = batch(model, rows()[:1], False)
    inputs["targets"][:, 5] = 2  # the end token, which is the padding token of some
    embeddings, _ = model.embed(inputs["input_ids"], inputs["pixel_values"], None)
    logits = model.llm(inputs_embeds=embeddings).logits.float()  # type: ignore[operator]
    full = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(**inputs).loss_sum, full, rtol=1e-5, atol=1e-5)


@every_llm
def test_tokens_enter_as_in_the_model_itself_and_images_as_the_yaml_says(name: str) -> None:
    model = model_of(name)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    table = model.llm.get_input_embeddings()  # type: ignore[operator]
    own = model.llm(input_ids=ids).logits  # type: ignore[operator]
    torch.testing.assert_close(model.llm(inputs_embeds=table(ids)).logits, own)  # type: ignore[operator]
    gemma = name.startswith("gemma")
    torch.testing.assert_close(table(ids), table.weight[ids] * (table.weight.shape[1] ** 0.5 if gemma else 1.0))

    features = model.tower_features(PIXELS[:1])
    slots = torch.full((1, model.image_tokens), SLOT)
    embedded, _ = model.embed(slots, None, features)
    factor = table.weight.shape[1] ** 0.5 if name == "gemma" else 1.0  # as in TinyLLaVA Factory, with transformers 4
    torch.testing.assert_close(embedded, model.connector(features) * factor)


@every_llm
def test_saving_and_loading_keeps_loss_and_ties(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    identities = {
        "llm": {"_target_": choice(name)["_target_"]},
        "vision_tower": {
            "_target_": "tinylmm.models.vision.HFVisionTower",
            "encoder": "transformers.SiglipVisionModel",
            "image": IMAGE,
        },
    }
    output = {"select_layer": -2, "select": "patch", "drop_first_token": False}
    connector = {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}}
    description = describe(identities, output, connector, "llama", model.image_scale != 1.0)
    # As it is gathered over ranks: tied tensors have become two, and every one is new.
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for number, given in enumerate((None, state)):
        save_model(LoadedModel(model, tiny_tokenizer(), description, None), tmp_path / str(number), given, {})
        again = load_model(tmp_path / str(number), []).model.eval()
        inputs = batch(model, rows(), True)
        assert torch.equal(again(**inputs).loss_sum, model(**inputs).loss_sum)
        before, after = dict(model.llm.named_parameters()), dict(again.llm.named_parameters())
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        tied = again.llm.get_output_embeddings().weight is again.llm.get_input_embeddings().weight  # type: ignore[operator]
        assert tied == again.llm.config.tie_word_embeddings  # type: ignore[union-attr]


@every_llm
@torch.no_grad()
def test_generation_with_a_cache_equals_the_best_token_of_the_whole_text(name: str) -> None:
    model = model_of(name)
    image = [SLOT] * model.image_tokens
    prompts = [[1, *image, 7, 8, 9, 10, 11], [20, 21, 22], [1, *image, *range(30, 42)]]
    features = model.tower_features(PIXELS[:2])
    found = generate(model, prompts, features, 6, eos_token_id=VOCAB, pad_token_id=0)  # an id that no model gives
    for prompt, answer, own in zip(prompts, found, (features[:1], None, features[1:]), strict=True):
        text = list(prompt)
        for _ in range(6):
            embeddings, _ = model.embed(torch.tensor([text]), None, own)
            text.append(int(model.llm(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax()))  # type: ignore[operator]
        assert answer == text[len(prompt) :]


@every_llm
def test_dropout_is_what_the_yaml_says(name: str) -> None:
    model = copy.deepcopy(model_of(name)).train()
    inputs = batch(model, rows(), True)
    rates = {
        key: rate for key, rate in choice(name)["architecture"].items() if key.endswith(("dropout", "pdrop")) and rate
    }
    assert rates == ({"resid_pdrop": 0.1} if name == "phi2" else {})
    assert torch.equal(model(**inputs).loss_sum, model(**inputs).loss_sum) == (not rates)


@every_llm
def test_every_row_of_the_embedding_can_be_trained(name: str) -> None:
    table = model_of(name).llm.get_input_embeddings()  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(table(torch.arange(VOCAB)).sum(), table.weight)
    assert gradient.all(), "also the padding token's, which may be the end of a turn"


@every_llm
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(model_of(name))
        inputs = batch(model, rows(), True)
        for module in model.modules():
            module.training = not isinstance(module, torch.nn.Dropout)  # blocks checkpoint in training only
        if checkpointing:
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model(**inputs).loss_sum.backward()
        gradients.append([parameter.grad for parameter in model.llm.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_full_architecture_has_the_published_number_of_parameters(name: str) -> None:
    spec = choice(name)
    model_class = resolve_target(spec["_target_"])
    with torch.device("meta"):
        llm = model_class(model_class.config_class(**spec["architecture"]))
    llm.tie_weights()
    assert sum(parameter.numel() for parameter in llm.parameters()) == PUBLISHED[name]
    assert len(decoder_blocks(llm)) == llm.config.num_hidden_layers


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_config_json_of_the_time_of_release_agrees_with_the_yaml(name: str) -> None:
    """Published files say rope_theta where transformers 5 says rope_parameters, and Gemma's says gelu."""
    architecture = choice(name)["architecture"]
    released = {key: value for key, value in architecture.items() if not key.endswith("dropout")}
    rope = dict(released.pop("rope_parameters", {}))
    if "full_attention" in rope:
        local = rope["sliding_attention"]["rope_theta"]
        released |= {"rope_theta": rope["full_attention"]["rope_theta"], "rope_local_base_freq": local}
    else:
        released |= {key: value for key, value in rope.items() if key != "rope_type"}
    if name == "gemma":
        released["hidden_act"] = "gelu"
    config = resolve_target(choice(name)["_target_"]).config_class.from_dict(released)
    reconcile(config, architecture, name)
    width = "model_dim" if "model_dim" in architecture else "hidden_size"
    with pytest.raises(UserError, match=width):
        reconcile(config, architecture | {width: 2 * architecture[width]}, name)


def test_every_published_llm_is_counted() -> None:
    assert set(NAMES) - set(PUBLISHED) == {"nano", "nano_small", "nano_video"}


def test_a_tied_head_trains_under_ddp_with_a_chunked_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylmm.models.loss.CHUNK_TOKENS", 3)
    alone = copy.deepcopy(model_of("openelm"))
    shared = copy.deepcopy(alone)
    for model in (alone, shared):
        model.vision_tower.requires_grad_(False)
    inputs = batch(alone, rows(), True)
    alone(**inputs).loss_sum.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(shared)(**inputs).loss_sum.backward()
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_soft_caps_bend_what_they_should() -> None:
    """Without this the Gemma 2 cases above could pass on scores and logits too small to be capped."""
    plain = tiny_llm("gemma2_2b", attn_logit_softcapping=None, final_logit_softcapping=None).eval()
    ids = torch.arange(3, 15).unsqueeze(0)
    for caps in ({"attn_logit_softcapping": 0.5}, {"final_logit_softcapping": 0.5}):
        changes = {"attn_logit_softcapping": None, "final_logit_softcapping": None} | caps
        capped = tiny_llm("gemma2_2b", **changes).eval()
        assert (capped(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 0.01
