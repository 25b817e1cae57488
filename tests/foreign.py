"""Tiny checkpoints of other tools, written from scratch in the layouts that the tools write, and what they must answer.

Names and files follow the layouts of TinyLLaVA Factory, TinyLLaVABench, LLaVA and transformers; nothing of tinylmm is used
to write them or to compute the reference logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.builders import LLAMA, VISION, WIDTH, tiny_tokenizer
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.convert.conversion import ImportReport, import_model
from tinylmm.models.checkpoint import LoadedModel, load_model

Tensors = dict[str, Tensor]
TYPES = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
PHI = {
    k: LLAMA[k]
    for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
}


@dataclass
class Foreign:
    """Random parts, and the tensors that tools save of them.

    Attributes:
        skip: features that the tool drops at index 0 of the layer it reads.
        layer: index into the tower's hidden states.
    """

    llm: PreTrainedModel
    encoder: PreTrainedModel
    mlp: nn.Sequential
    kind: str
    skip: int
    layer: int = -2
    extra: dict[str, Any] = field(default_factory=dict)

    def llm_tensors(self) -> Tensors:
        return {k: v.clone() for k, v in self.llm.state_dict().items()}

    def tower_tensors(self) -> Tensors:
        """By the names that transformers 4 gave them."""
        return {f"vision_model.{k}": v.clone() for k, v in self.encoder.state_dict().items()}

    def connector_tensors(self) -> Tensors:
        return {k: v.clone() for k, v in self.mlp.state_dict().items()}

    def logits(self, before: list[int], pixels: Tensor, after: list[int]) -> Tensor:
        """(L, V) for text, one image, text: the definition, step by step."""
        with torch.no_grad():
            hidden = self.encoder(pixels, output_hidden_states=True).hidden_states[self.layer][:, self.skip :]
            embed = self.llm.get_input_embeddings()
            row = torch.cat([embed(torch.tensor([before])), self.mlp(hidden), embed(torch.tensor([after]))], dim=1)
            return self.llm(inputs_embeds=row).logits[0]


def foreign(kind: str = "siglip", skip: int = 1, llm: str = "llama", tied: bool = False) -> Foreign:
    torch.manual_seed(5)
    language: PreTrainedModel = (
        LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
        if llm == "llama"
        else PhiForCausalLM(PhiConfig(**PHI, num_attention_heads=4))
    )
    tower = (
        SiglipVisionModel(SiglipVisionConfig(**VISION))
        if kind == "siglip"
        else CLIPVisionModel(CLIPVisionConfig(**VISION))
    )
    for parameter in tower.parameters():  # biases and norms too: a swap of two must show
        nn.init.normal_(parameter, std=0.3)
    mlp = nn.Sequential(nn.Linear(VISION["hidden_size"], WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return Foreign(language.eval(), tower.eval(), mlp, kind, skip)


def part_config(model: PreTrainedModel, **more: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), **more}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_pickle(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)


def factory_config(parts: Foreign, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "vision_model_name_or_path": "google/tiny-siglip",
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": parts.layer,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "pad_token": "<pad>",
        "text_config": part_config(parts.llm),
        "vision_config": part_config(parts.encoder, model_name_or_path="google/tiny-siglip"),
        **more,
    }


def factory_tensors(parts: Foreign) -> Tensors:
    return {
        **{f"language_model.{k}": v for k, v in parts.llm_tensors().items()},
        **{f"vision_tower._vision_tower.{k}": v for k, v in parts.tower_tensors().items()},
        **{f"connector._connector.{k}": v for k, v in parts.connector_tensors().items()},
    }


def write_factory_folders(folder: Path, parts: Foreign, base_layer: bool = False) -> None:
    """The pretraining's three folders; named_parameters() only, as the Factory saves them."""

    def named(tensors: Tensors) -> Tensors:
        if not base_layer:
            return tensors
        return {k.replace("_proj.", "_proj.base_layer."): v for k, v in tensors.items()}

    parameters = dict(parts.llm.named_parameters())  # tied duplicates once
    write_json(folder / "config.json", factory_config(parts))
    write_json(folder / "language_model/config.json", part_config(parts.llm))
    write_pickle(folder / "language_model/pytorch_model.bin", named({k: v.detach() for k, v in parameters.items()}))
    write_json(folder / "vision_tower/config.json", part_config(parts.encoder))
    write_pickle(folder / "vision_tower/pytorch_model.bin", parts.tower_tensors())
    connector = {f"_connector.{k}": v for k, v in parts.connector_tensors().items()}
    write_pickle(folder / "connector/pytorch_model.bin", connector)
    tiny_tokenizer().save_pretrained(folder)


def write_merged(
    folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 2, pickled: bool = False
) -> None:
    """One Hugging Face save, in shards with an index."""
    write_json(folder / "config.json", config)
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{end}"
        part = {k: v.contiguous() for k, v in [*tensors.items()][number::shards]}
        torch.save(part, folder / name) if pickled else save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / f"{stem}.{end}.index.json", {"metadata": {}, "weight_map": weight_map})
    tiny_tokenizer().save_pretrained(folder)


def write_base(folder: Path, model: PreTrainedModel, tensors: Tensors, tokenizer: bool = False) -> Path:
    """A published part: config.json and safetensors."""
    write_json(folder / "config.json", part_config(model))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def llava_config(parts: Foreign, kind: str = "llava_llama", **more: Any) -> dict[str, Any]:
    """LLaVA mixes its own keys into the LLM's config."""
    return {
        **part_config(parts.llm),
        "model_type": kind,
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/tiny-clip",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": parts.layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        **more,
    }


def llava_tensors(parts: Foreign, tower: bool = True) -> Tensors:
    vision = {f"model.vision_tower.vision_tower.{k}": v for k, v in parts.tower_tensors().items()}
    return {
        **parts.llm_tensors(),
        **{f"model.mm_projector.{k}": v for k, v in parts.connector_tensors().items()},
        **(vision if tower else {}),
    }


def lora_pair(targets: list[str], shapes: Tensors, rank: int = 4) -> Tensors:
    """Random A and B for each target weight, by peft's names below `base_model.model.`."""
    torch.manual_seed(9)
    found: Tensors = {}
    for target in targets:
        rows, columns = shapes[f"{target}.weight"].shape
        found[f"base_model.model.{target}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
        found[f"base_model.model.{target}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return found


def load_imported(source: Path, target: Path, **options: Any) -> tuple[LoadedModel, ImportReport]:
    report = import_model(source, target, **options)
    loaded = load_model(target, [])
    loaded.model.eval()
    return loaded, report


def our_logits(loaded: LoadedModel, before: list[int], pixels: Tensor, after: list[int]) -> Tensor:
    """(L, V) of the imported model for the same row."""
    model = loaded.model
    row = torch.tensor([before + [IMAGE_TOKEN_ID] * model.image_tokens + after])
    with torch.no_grad():
        embeddings, _ = model.embed(row, pixels, None)
        return model.llm(inputs_embeds=embeddings).logits[0]  # type: ignore[no-any-return]
