"""The plain way: transformers' Llava under transformers' Trainer, as TinyLLaVA Factory's scripts set it, on the same samples.

Samples are padded to the longest of a micro-batch, logits are made at every position, and a sample without an image pays for a
blank one.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
)

from benchmarks.gpu_sections.ours import READY, Clock, until_it_fits
from benchmarks.gpu_sections.setting import Setting, draw

MICRO_BATCH = {"pretrain": 16, "finetune": 8}


def train_plain(setting: Setting, llm: str, stage: str, checkpointing: bool) -> dict[str, Any]:
    """Train some steps and say how fast that was."""
    micro = 2 if setting.tiny else MICRO_BATCH[stage]
    return until_it_fits(lambda size: _train(setting, llm, stage, checkpointing, size), micro)


def _train(setting: Setting, llm: str, stage: str, checkpointing: bool, micro: int) -> dict[str, Any]:
    setting.forget_peak()
    model = plain_model(setting, llm)
    for name, parameter in model.named_parameters():
        trained = "multi_modal_projector" in name or (stage == "finetune" and "vision_tower" not in name)
        parameter.requires_grad_(trained)
        if setting.on_gpu and not trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    arguments = TrainingArguments(
        output_dir=str(setting.folder / "plain"),
        max_steps=setting.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=setting.batch(stage) // micro,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        learning_rate=1e-5,
        bf16=setting.on_gpu,
        optim="adamw_torch_fused" if setting.on_gpu else "adamw_torch",
        use_cpu=not setting.on_gpu,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one card, as ours
    clock = Clock(setting)
    rows = draw(stage, setting.batch(stage) * setting.steps, model.config.text_config.vocab_size)
    data = [{"row": row, "number": number} for number, row in enumerate(rows)]
    collate = _Padded(model.config.image_seq_length, model.config.image_token_id, model.config.vision_config.image_size)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[clock])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "llm": llm,
        "stage": stage,
        "checkpointing": checkpointing,
        "samples_per_s": setting.batch(stage) / clock.seconds_a_step(),
        "peak_gib": setting.peak_gib(),
        "loss": clock.losses[-1],
    }


def plain_model(setting: Setting, llm: str) -> LlavaForConditionalGeneration:
    """transformers' Llava of the same shapes, random, on the device."""
    run = setting.compose(llm)
    language, vision = dict(run.llm.architecture), dict(run.vision_tower.architecture)
    kind = getattr(transformers, run.llm.target.rpartition(".")[2])
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=kind.config_class(**language),
        image_token_id=language["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        image_seq_length=patches,
    )
    torch.manual_seed(0)
    with setting.device:
        return LlavaForConditionalGeneration(config)


class _Padded:
    """Makes a batch of samples, every row as long as the longest."""

    def __init__(self, patches: int, image_id: int, size: int) -> None:
        self.patches, self.image_id = patches, image_id
        self.pixels = torch.randn(READY, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(sample["row"][0]) for sample in samples) + self.patches
        ids = torch.zeros(len(samples), width, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for place, sample in enumerate(samples):
            own, learnt, _ = sample["row"]
            end = self.patches + len(own)
            ids[place, : self.patches] = self.image_id
            ids[place, self.patches : end], labels[place, self.patches : end] = torch.tensor(own), torch.tensor(learnt)
            mask[place, :end] = 1
        pixels = torch.stack([self.pixels[one["number"] % READY] * one["row"][2] for one in samples])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}
