"""The smallest real objects: random tiny configs of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinylmm.config.description import ModelDescription
from tinylmm.config.identities import ConnectorIdentity, PartIdentity, TowerIdentity, TowerOutput
from tinylmm.config.recipe import TuneSpec
from tinylmm.config.spec import DataSpec, EvalSpec, ImageSpec
from tinylmm.models.build import PartSource, build_lmm
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import PartTuning, apply_tuning
from tinylmm.models.vision import HFVisionTower
from tinylmm.planning.graph import MISSING

WIDTH, VOCAB, IMAGE_SIZE, PATCH = 32, 320, 16, 8
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}
IMAGE = {"size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash", "resample": "bicubic"}


def tiny_tower(
    kind: str = "siglip", select_layer: int = -2, select: str = "patch", drop: bool = False
) -> HFVisionTower:
    encoder = (
        SiglipVisionModel(SiglipVisionConfig(**VISION))
        if kind == "siglip"
        else CLIPVisionModel(CLIPVisionConfig(**VISION))
    )
    return HFVisionTower(encoder, select_layer, select, drop)


def tiny_lmm(seed: int = 0, kind: str = "siglip") -> LMM:
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA))
    tower = tiny_tower(kind)
    return LMM(llm, tower, MLPConnector(tower.hidden_size, WIDTH), "llama")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<unk>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["A chat between a curious user and an assistant. USER: what is it? ASSISTANT: a red 3"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def describe(
    identities: dict[str, dict[str, Any]],
    tower_output: dict[str, Any],
    connector: dict[str, Any],
    template: str,
    scaled: bool = False,
) -> ModelDescription:
    """The description of a model whose parts are given as the YAMLs have them."""
    tower = identities["vision_tower"]
    targets = (identities["llm"]["_target_"], tower["_target_"], tower["encoder"])
    read = TowerOutput(**tower_output)
    joined = ConnectorIdentity(**{key: connector[key] for key in ("_target_", "options") if key in connector})
    return ModelDescription.of_targets(*targets, read, joined, ImageSpec(**tower["image"]), template, scaled)


def redescribe(loaded: LoadedModel, **changes: Any) -> None:
    """Change what a loaded model's config.json says."""
    loaded.description = ModelDescription.model_validate(loaded.description.as_json() | changes)


def tiny_loaded(seed: int = 0) -> LoadedModel:
    identities: dict[str, dict[str, Any]] = {
        "llm": {"_target_": "transformers.LlamaForCausalLM"},
        "vision_tower": {
            "_target_": "tinylmm.models.vision.HFVisionTower",
            "encoder": "transformers.SiglipVisionModel",
            "image": IMAGE,
        },
    }
    connector = {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}}
    tower_output = {"select_layer": -2, "select": "patch", "drop_first_token": False}
    return LoadedModel(tiny_lmm(seed), tiny_tokenizer(), describe(identities, tower_output, connector, "llama"), None)


def build(spec: dict[str, Any], llm_folder: Path | None = None) -> LMM:
    """Put a model together from identities as the YAMLs have them; the LLM's weights may lie in a folder."""
    return build_lmm(
        PartSource(PartIdentity.of_record(spec["llm"]), local=None if llm_folder is None else str(llm_folder)),
        PartSource(TowerIdentity.of_record(spec["vision_tower"])),
        ConnectorIdentity(
            **{"_target_": spec["connector"]["_target_"], "options": spec["connector"].get("options", {})}
        ),
        TowerOutput(**spec["tower_output"]),
        "llama",
        seed=0,
        trust=[],
        scale_image_features=bool(spec.get("scale_image_features")),
    )


def tuning(model: LMM, tune: dict[str, Any], **options: Any) -> dict[str, PartTuning]:
    """`apply_tuning` with the recipe's words."""
    return apply_tuning(model, TuneSpec.model_validate(tune), **options)


class NoFiles:
    """Fingerprints of files that nothing here depends on."""

    def source(self, data: DataSpec, name: str) -> dict[str, Any]:
        return {}

    def benchmark(self, spec: EvalSpec) -> dict[str, Any]:
        return {MISSING: spec.benchmark} if spec.optional else {}

    def checkpoint(self, path_or_id: str) -> dict[str, Any]:
        return {}

    def model(self, folder: str) -> dict[str, Any]:
        return {}

    def stage_of(self, model: str) -> None:
        return None


def record(sample_id: str, ids: list[int], supervised: int, images: tuple[str, ...] = ()) -> dict[str, Any]:
    """A prepared row whose last `supervised` tokens are answers."""
    labels = [-100] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    return {"sample_id": sample_id, "input_ids": ids, "labels": labels, "images": list(images)}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
