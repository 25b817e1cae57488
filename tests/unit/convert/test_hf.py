"""A folder written with `--format hf` is read by transformers alone, and answers as our model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.chat_template_utils import render_jinja_template

import tinylmm
from tests.builders import LLAMA, VISION, VOCAB, WIDTH, redescribe, tiny_loaded, tiny_tower
from tests.foreign import PHI
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.convert.chat_template import jinja_template, messages, template_of
from tinylmm.convert.conversion import ExportReport, import_model, write_model
from tinylmm.convert.format import Export
from tinylmm.convert.formats.hf import obstacles
from tinylmm.convert.hf_folder import renamed
from tinylmm.data.chat import TEMPLATES, Turn
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import DataError, UserError
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.connectors import LinearConnector, MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig


def export_hf(loaded: LoadedModel, folder: Path, dtype: torch.dtype = torch.float32) -> ExportReport:
    return write_model(loaded, folder, "hf", dtype)


CLIP = {"select_layer": -1, "select": "patch", "drop_first_token": False}


def loaded_with(
    llm: nn.Module, kind: str = "siglip", mode: str = "squash", connector: Any = None, **tower: Any
) -> LoadedModel:
    """tiny_loaded with other parts; its tower's output and its image mode may be changed."""
    loaded = tiny_loaded()
    output = {"select_layer": -2, "select": "patch", "drop_first_token": False} | tower
    vision = tiny_tower(kind, output["select_layer"], output["select"], output["drop_first_token"])
    connector = connector or MLPConnector(VISION["hidden_size"], WIDTH)
    encoder = {"siglip": "transformers.SiglipVisionModel", "clip": "transformers.CLIPVisionModel"}[kind]
    said = loaded.description.as_json()
    redescribe(
        loaded,
        llm={"_target_": f"transformers.{type(llm).__name__}"},
        vision_tower=said["vision_tower"] | {"encoder": encoder, **output},
        image=said["image"] | {"mode": mode},
    )
    loaded.model = LMM(llm, vision, connector, "llama")
    return loaded


def qwen(**more: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA, **more))


def ours_and_theirs(
    loaded: LoadedModel, folder: Path, turns: list[Turn], image: Image.Image
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the whole way from words and an image: our code on one side, transformers' alone on the other."""
    model = loaded.model.eval()
    ids = TEMPLATES[model.template].render_prompt(turns, loaded.tokenizer)
    row = torch.tensor([[t for i in ids for t in ([i] * model.image_tokens if i == IMAGE_TOKEN_ID else [i])]])
    pixels = ImageTransform.of(loaded.description.image)(image)[None]
    processor = AutoProcessor.from_pretrained(folder)
    exported = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    text = processor.apply_chat_template(messages(turns), add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        return model.llm(inputs_embeds=model.embed(row, pixels, None)[0]).logits, exported(**inputs).logits


@pytest.mark.parametrize(
    ("llm", "kind", "mode", "tower"),
    [
        (lambda: tiny_loaded().model.llm, "siglip", "squash", {}),
        (lambda: qwen(tie_word_embeddings=True), "siglip", "pad", {"drop_first_token": True}),
        (lambda: qwen(), "clip", "center_crop", {"select_layer": 1}),
        (lambda: tiny_loaded().model.llm, "clip", "center_crop", {"select": "all", "select_layer": -1}),
    ],
    ids=["llama-siglip", "tied-qwen-728", "qwen-clip", "llama-clip-cls"],
)
def test_transformers_alone_gives_the_same_logits_from_words_and_image(
    tmp_path: Path, llm: Any, kind: str, mode: str, tower: dict[str, Any]
) -> None:
    loaded = loaded_with(llm(), kind, mode, **tower)
    report = export_hf(loaded, tmp_path / "hf")
    assert report.difference is not None and report.difference < 1e-5 and report.notes == []
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    turns = [Turn("<image>\nWhat is it?", "a red 3"), Turn("Sure?", None)]
    ours, theirs = ours_and_theirs(loaded, tmp_path / "hf", turns, Image.fromarray(pixels))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    import_model(tmp_path / "hf", tmp_path / "again")
    again = load_model(tmp_path / "again", [])
    before, after = loaded.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.description.image == loaded.description.image and again.model.template == "llama"
    assert again.model.image_tokens == loaded.model.image_tokens


def test_a_full_vocabulary_gets_rows_for_the_image_token_and_loses_them_again(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    rows = len(loaded.tokenizer)
    loaded.model.llm.resize_token_embeddings(rows, mean_resizing=False)
    report = export_hf(loaded, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["image_token_index"] == rows and config["text_config"]["vocab_size"] % 64 == 0
    assert any("rows of zeros" in note for note in report.notes)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["suppress_tokens"] == [rows]
    import_model(tmp_path / "hf", tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again", []).model.llm.lm_head.weight, loaded.model.llm.lm_head.weight)


def test_a_narrow_dtype_is_written_and_still_compared(tmp_path: Path) -> None:
    report = export_hf(tiny_loaded(), tmp_path / "hf", torch.bfloat16)
    assert report.difference is not None and report.difference < 1e-5
    assert (tmp_path / "hf/model.safetensors").stat().st_size < 150_000  # fp32 takes 260 kB


def test_rounding_weights_leaves_rotary_frequencies_as_transformers_computes_them(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    with torch.no_grad():  # sharp attention, so that positions matter
        for layer in loaded.model.llm.model.layers:
            layer.self_attn.q_proj.weight *= 30
            layer.self_attn.k_proj.weight *= 30
    frequencies = loaded.model.llm.model.rotary_emb.inv_freq.clone()
    report = export_hf(loaded, tmp_path / "hf", torch.bfloat16)
    assert report.difference is not None and report.difference < 1e-5
    assert torch.equal(loaded.model.llm.model.rotary_emb.inv_freq, frequencies)


def test_an_llm_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    shape = {"model_dim": WIDTH, "num_transformer_layers": 2, "head_dim": 8, "vocab_size": VOCAB, "ffn_dim_divisor": 8}
    loaded = loaded_with(OpenELMForCausalLM(OpenELMConfig(**shape)))
    with pytest.raises(UserError, match=r"AutoModel builds from its config, and OpenELMForCausalLM is none"):
        export_hf(loaded, tmp_path / "hf")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision_feature_select_strategy", "mean", "vision_feature_select_strategy=mean; importable are one layer"),
        ("vision_feature_layer", [-2, -5], r"vision_feature_layer=\[-2, -5\]"),
        ("projector_hidden_act", "silu", "projector_hidden_act=silu"),
        ("image_token_index", "many", "config.json is no LlavaConfig"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_by_name(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    export_hf(tiny_loaded(), tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {field: value}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model")


def phi(**more: Any) -> PhiForCausalLM:
    """With biases and norms that are not zeros and ones."""
    torch.manual_seed(3)
    made = PhiForCausalLM(PhiConfig(**PHI, num_attention_heads=4, **more))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def test_what_the_class_cannot_hold_is_refused_with_every_reason(tmp_path: Path) -> None:
    llama = tiny_loaded().model.llm
    llama.lm_head.bias = nn.Parameter(torch.ones(VOCAB))  # an RMS norm does not centre: no weights can say it
    loaded = loaded_with(llama, "clip", connector=LinearConnector(24, WIDTH), drop_first_token=True)
    with pytest.raises(UserError) as raised:
        export_hf(loaded, tmp_path / "hf")
    text = str(raised.value)
    assert "this connector is LinearConnector" in text and "drops two" in text
    assert "output layer has no bias, that of LlamaForCausalLM has one" in text
    assert not list(tmp_path.iterdir())
    tied = phi(tie_word_embeddings=True)
    assert any("output layer has no bias" in reason for reason in obstacles(Export(loaded_with(tied), torch.float32)))
    three = loaded_with(phi(), connector=MLPConnector(24, WIDTH, depth=3))
    assert any("MLPConnector of 3 linear layers" in reason for reason in obstacles(Export(three, torch.float32)))
    gemma = Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5)).eval()
    assert any(
        "final_logit_softcapping is 0.5" in reason for reason in obstacles(Export(loaded_with(gemma), torch.float32))
    )


def test_a_phi_whose_bias_is_zero_fits_as_it_is(tmp_path: Path) -> None:
    llm = phi()
    nn.init.zeros_(llm.lm_head.bias)
    report = export_hf(loaded_with(llm), tmp_path / "hf")
    assert report.difference is not None and report.difference < 1e-5 and report.notes == []
    written = load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(written["language_model.lm_head.weight"], llm.lm_head.weight)


def test_the_bias_of_phis_output_layer_is_said_by_other_weights(tmp_path: Path) -> None:
    """Phi-2 has one, and LlavaForConditionalGeneration none."""
    loaded = loaded_with(phi())
    with torch.no_grad():
        loaded.model.llm.model.final_layernorm.weight[0] = 0  # a channel that says nothing must not be divided by
    before = copy.deepcopy(loaded)
    report = export_hf(loaded, tmp_path / "hf")
    assert any("output layer has no bias: that of the LLM is said by the weights" in note for note in report.notes)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    ours, theirs = ours_and_theirs(before, tmp_path / "hf", [Turn("<image>\nWhat?", None)], Image.fromarray(pixels))
    largest = float(ours.abs().max())
    assert report.difference is not None and report.difference < 1e-5 * largest
    torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=0)
    assert float(before.model.llm.lm_head.bias.abs().max()) > 0.1 * largest, "too small to be missed"
    again = import_model(tmp_path / "hf", tmp_path / "again")
    assert any("filled with zeros" in note for note in again.notes)
    row = torch.randint(0, VOCAB, (1, 9))
    with torch.no_grad():
        imported = load_model(tmp_path / "again", []).model.llm.eval()(row).logits
        torch.testing.assert_close(before.model.llm(row).logits, imported, atol=1e-5 * largest, rtol=0)


def test_narrow_weights_say_how_far_they_are_from_the_bias(tmp_path: Path) -> None:
    loaded = loaded_with(phi())
    report = export_hf(loaded, tmp_path / "hf", torch.bfloat16)
    assert report.difference is not None and 1e-5 < report.difference < 0.1
    assert any(f"moves logits by {report.difference:.1e}" in note for note in report.notes)


@pytest.mark.parametrize("mode", ["squash", "pad", "center_crop"])
def test_a_folder_names_its_classes_and_counts_an_images_tokens_as_vllm_asks_for_them(
    tmp_path: Path, mode: str
) -> None:
    loaded = loaded_with(qwen(), mode=mode)
    export_hf(loaded, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    counted = processor._get_num_multimodal_tokens(image_sizes=[(20, 30)])
    assert counted["num_image_tokens"] == [loaded.model.image_tokens]


def test_jinja_renders_what_the_template_renders_and_captions_have_none() -> None:
    for name, template in TEMPLATES.items():
        if name == "native":  # the tokenizer's own; below
            continue
        source = jinja_template(template)
        assert (source is None) == (name in ("pretrain", "plain")), name


def test_the_jinja_of_a_question_that_is_only_an_image_has_no_newline_behind_it() -> None:
    source = jinja_template(TEMPLATES["llama"])
    for user in ("<image>", "<image>\n\n", "\n<image>"):
        turns = [Turn(user, "Two ducks."), Turn(user, None)]
        (text,), _ = render_jinja_template([messages(turns)], chat_template=source, add_generation_prompt=True)
        assert text == TEMPLATES["llama"].text(turns)
        assert text.endswith(" USER: <image> ASSISTANT: Two ducks.</s>USER: <image> ASSISTANT:")


def test_a_tokenizers_own_format_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    loaded.model.template = "native"
    redescribe(loaded, template="native")
    report = export_hf(loaded, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    turns = [Turn("<image>\nWhat is it?", "a red 3"), Turn("Sure?", None)]
    text = processor.apply_chat_template(messages(turns), add_generation_prompt=True)
    assert text == TEMPLATES["native"].fitted(loaded.tokenizer).text(turns) and report.difference is not None


@pytest.mark.parametrize("old", [False, True], ids=["new-names", "old-names"])
def test_a_peft_adapter_of_the_whole_model_is_merged_into_the_folder_that_is_named(tmp_path: Path, old: bool) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    export_hf(loaded_with(qwen()), base)
    targets = ["q_proj", "v_proj", "linear_1"]
    wrapped = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(base), LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(adapter)
    AutoProcessor.from_pretrained(base).save_pretrained(base)
    if not old:
        new = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
        new |= {"vision_tower.vision_model.": "model.vision_tower.", "multi_": "model.multi_"}
        tensors = load_file(base / "model.safetensors")
        save_file(renamed(tensors, new), base / "model.safetensors", metadata={"format": "pt"})
        assert "model.vision_tower.embeddings.patch_embedding.weight" in load_file(base / "model.safetensors")
    for file in (*base.glob("token*"), *base.glob("process*")):
        (adapter / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"adapter of a whole model .*--llm FOLDER; or merge it first"):
        import_model(adapter, tmp_path / "refused")
    report = import_model(adapter, tmp_path / "ours", llm=base)
    assert report.layout == "transformers-lora" and any("adapter" in note for note in report.notes)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in (*base.glob("token*"), *base.glob("process*"), base / "tinylmm.json"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    import_model(tmp_path / "merged", tmp_path / "theirs")
    ours, theirs = (load_model(tmp_path / name, []).model.state_dict() for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])


IN_FRONT = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}CUE{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As processors of LLaVA in transformers have it: images first, then the words."""


@pytest.mark.parametrize("kept_in", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer"])
@pytest.mark.parametrize(("cue", "name"), [("\n", "hf_llava"), (" ", "hf_llava_1_5")])
def test_the_chat_template_of_the_folder_is_the_models_so_that_its_cards_prompt_gives_equal_answers(
    kept_in: str, cue: str, name: str, tmp_path: Path
) -> None:
    loaded, folder = tiny_loaded(), tmp_path / "hf"
    export_hf(loaded, folder)
    (folder / "tinylmm.json").unlink()
    (folder / "chat_template.jinja").unlink()
    source = IN_FRONT.replace("CUE", f"{{{{ {cue!r} }}}}")
    if kept_in.endswith(".jinja"):
        (folder / kept_in).write_text(source)
    else:
        path = folder / ("tokenizer_config.json" if kept_in == "tokenizer" else kept_in)
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | {"chat_template": source}))
    report = import_model(folder, tmp_path / "ours")
    assert report.description.template == name and any(f"'{name}' asks as the one in" in note for note in report.notes)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    chat = tinylmm.load(tmp_path / "ours", device="cpu")
    card = f"USER: <image>\nWhat is it?{cue}ASSISTANT:"
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=picture, text=card, return_tensors="pt")
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    said = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert chat.chat("What is it?", picture, max_new_tokens=8) == expected


def test_a_chat_template_that_is_none_of_ours_is_named_and_one_that_is_broken_refused(tmp_path: Path) -> None:
    export_hf(tiny_loaded(), tmp_path / "hf")
    (tmp_path / "hf/tinylmm.json").unlink()
    (tmp_path / "hf/chat_template.jinja").write_text(
        "{% for message in messages %}### {{ message['role'] }}{% endfor %}"
    )
    report = import_model(tmp_path / "hf", tmp_path / "ours")
    assert (
        "the chat template in chat_template.jinja is none of ours, and is not taken (--template names one)"
        in report.notes
    )
    (tmp_path / "hf/chat_template.jinja").write_text("{% for message in %}")
    with pytest.raises(DataError, match=r"chat_template\.jinja: its chat template cannot be rendered: .*--template"):
        import_model(tmp_path / "hf", tmp_path / "other")
    assert import_model(tmp_path / "hf", tmp_path / "named", template="llama").description.template == "llama"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "native" and jinja_template(TEMPLATES[name])])
def test_what_was_exported_is_found_again_by_its_text_alone(name: str) -> None:
    tokenizer, template = tiny_loaded().tokenizer, TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(template.tokens)})
    if template.eos is not None:
        tokenizer.eos_token = template.eos
    source = jinja_template(template.fitted(tokenizer))
    assert source is not None
    found = template_of(source, tokenizer)
    assert found is not None
    turns = [Turn("<image>\nWhat is it?", "a cat"), Turn("Sure?", None)]
    assert TEMPLATES[found].fitted(tokenizer).text(turns) == template.fitted(tokenizer).text(turns)
