"""A train stage's fields as transformers.TrainingArguments, and DeepSpeed's configuration as a dict."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tinylmm.config.fields import PARTS
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.spec import TrackingSpec
from tinylmm.config.trainer import OWN_OPTIMIZERS, TrainerSpec
from tinylmm.planning.specs import TrainStage
from tinylmm.store.layout import CHECKPOINT_FOLDER

log = logging.getLogger(__name__)


@dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with the name of an optimiser of ours, where it is one (`training/inexact.py`)."""

    own_optim: str | None = None


def peak_learning_rates(lr: float | dict[Any, float]) -> dict[str, float]:
    """One peak learning rate a part."""
    return dict(lr) if isinstance(lr, dict) else dict.fromkeys(PARTS, lr)


def training_arguments(
    spec: TrainStage,
    launch: LaunchSpec,
    tracking: TrackingSpec,
    trainer: TrainerSpec,
    folder: Path,
    steps: int,
    accumulation: int,
    use_cpu: bool,
    readers: int,
) -> Arguments:
    """Translate a train stage.

    Args:
        folder: the stage's work folder.
        steps: optimiser steps in all.
        accumulation: micro-batches a rank takes in one step.
        use_cpu: train on the CPU.
        readers: processes that read samples for this rank.
    """
    fields: dict[str, Any] = dict(  # noqa: C408 (reads as the call it becomes)
        output_dir=str(folder / CHECKPOINT_FOLDER),
        max_steps=steps,
        per_device_train_batch_size=_micro_batch(launch, spec, accumulation),
        gradient_accumulation_steps=accumulation,
        learning_rate=max(peak_learning_rates(spec.lr).values()),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule),
        warmup_steps=math.ceil(spec.warmup_ratio * steps),
        weight_decay=spec.weight_decay,
        adam_beta1=spec.adam_betas[0],
        adam_beta2=spec.adam_betas[1],
        adam_epsilon=spec.adam_epsilon,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch" if use_cpu else "adamw_torch_fused",
        bf16=spec.precision == "bf16",
        fp16=spec.precision == "fp16",
        tf32=None,
        seed=spec.seed,
        logging_strategy="steps",
        logging_steps=tracking.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # our callback decides, our writer publishes
        report_to=[*(["tensorboard"] if tracking.tensorboard else []), *(["wandb"] if tracking.wandb.enabled else [])],
        disable_tqdm=True,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and launch.ranks > 1 else None,
        dataloader_num_workers=readers,
        remove_unused_columns=False,
        deepspeed=deepspeed_config(launch, spec, accumulation) if launch.sharding else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=launch.step_timeout_s,
    )
    own = spec.trainer.optim if spec.trainer.optim in OWN_OPTIMIZERS else None
    arguments = Arguments(own_optim=own, **(fields | trainer.as_arguments() | spec.trainer.as_arguments()))
    return _corrected(arguments, launch)


def _corrected(arguments: Arguments, launch: LaunchSpec) -> Arguments:
    """What TrainingArguments makes of this machine, put right."""
    if arguments.n_gpu > 1:  # a process is one rank: Trainer would put nn.DataParallel over all GPUs that it sees
        log.warning("this process sees %d GPUs and uses the first; launch=torchrun uses several", arguments.n_gpu)
        arguments._n_gpu = 1
    if launch.sharding:
        # Said until here, so that accelerate asks for the ranks of CPUs and bf16 is let through; said on, Trainer would
        # quietly leave DeepSpeed out.
        arguments.use_cpu = False
    return arguments


def deepspeed_config(launch: LaunchSpec, spec: TrainStage, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for ZeRO stage 2 or 3 with a client optimiser.

    ZeRO-3's "auto" sizes are written out: they would be read from the LLM's config, which knows nothing of the tower.
    """
    zero: dict[str, Any] = {"stage": launch.sharding, "overlap_comm": True, "contiguous_gradients": True}
    if launch.sharding == 3:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": launch.zero3_whole_below,
            "stage3_prefetch_bucket_size": 50_000_000,
            "sub_group_size": 1_000_000_000,
        }
    return {
        "train_micro_batch_size_per_gpu": _micro_batch(launch, spec, accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.precision == "bf16"},
        # As DDP does, whose gradients have the weights' type: in bf16 the small ones of many micro-batches are rounded away.
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": spec.precision == "fp16"},
        "steps_per_print": 2_000_000_000,
    }


def _micro_batch(launch: LaunchSpec, spec: TrainStage, accumulation: int) -> int:
    return math.ceil(spec.global_batch / (accumulation * launch.ranks))
