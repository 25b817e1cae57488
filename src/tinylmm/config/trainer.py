"""Fields of transformers.TrainingArguments that a run may set, and the reasons why it may not set the others. No torch.

A field is allowed where it does something in `training/trainer.py`, which has its own batches, loss, optimiser groups and
checkpoints. A field that changes what is learnt is part of a training stage's identity; one that changes how fast it is
learnt is not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tinylmm.config.fields import Frozen, Positive, Sparse
from tinylmm.errors import Fault, suggestion

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "muon", "adamw_bf16",
]  # fmt: skip
"""Optimisers of torch, transformers, (from the third row on) bitsandbytes and, in the last row, of `training/inexact.py`.
Others need packages that are no dependency of tinylmm, or take over the training loop."""

OWN_OPTIMIZERS = frozenset({"muon", "adamw_bf16"})
"""Those that TrainingArguments does not know; each needs whole tensors on every rank."""

ADAMW = frozenset({None, "adamw_torch", "adamw_torch_fused"})
"""Values of `optim` that mean the one that published recipes were trained with."""

_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
OPTIMIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX),
}
"""What transformers reads of `optim_args`, an optimiser. Weight decay is not among it: recipes set that."""

NO_ADAM = frozenset({"adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"})
"""Optimisers that read neither `adam_betas` nor `adam_epsilon` of a stage,"""
NO_EPSILON = NO_ADAM | {"lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"}
"""and those that do not read `adam_epsilon`."""


class SchedulerArguments(Frozen):
    """Further numbers of a stage's schedule."""

    num_cycles: Annotated[float, Field(gt=0)]
    """Of `schedule: cosine`: periods of the cosine; 0.5 falls from the peak rate to 0."""


class TrainerSpec(Sparse):
    """Further fields of transformers.TrainingArguments; what is not set is as tinylmm has it."""

    optim: Optimizer | None = None
    """By default adamw_torch_fused on a GPU and adamw_torch on a CPU; published recipes were trained with AdamW."""
    optim_args: str | None = None
    """Further numbers of the optimiser, as in `momentum=0.9,nesterov=true` of sgd."""
    lr_scheduler_kwargs: SchedulerArguments | None = None
    tf32: bool | None = None
    """Multiply fp32 numbers in 19 bits, on GPUs that can: faster, and less exact."""
    torch_compile: bool | None = None
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    torch_empty_cache_steps: Positive | None = None
    """Give the GPU's unused memory back every so many micro-batches."""
    dataloader_pin_memory: bool | None = None
    ddp_bucket_cap_mb: Positive | None = None
    """Megabytes of gradients that ranks exchange at once."""
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] | None = None
    """Of transformers' own messages."""

    @model_validator(mode="after")
    def _arguments_fit_the_optimizer(self) -> TrainerSpec:
        if self.optim_args is None:
            return self
        allowed = OPTIMIZER_ARGUMENTS.get(self.optim or "", ())
        if not allowed:
            takers = ", ".join(OPTIMIZER_ARGUMENTS)
            raise ValueError(
                f"sets optim_args, which optim={self.optim or 'adamw_torch'} does not read; these do: {takers}"
            )
        for pair in self.optim_args.replace(" ", "").split(","):
            key, separator, _ = pair.partition("=")
            if key not in allowed or not separator:
                hint = suggestion(key, allowed)
                raise ValueError(
                    f"has '{pair}' in optim_args; optim={self.optim} reads KEY=NUMBER of {', '.join(allowed)}. {hint}".strip()
                )
        return self

    def as_arguments(self) -> dict[str, Any]:
        """Return every field that is set, as TrainingArguments takes it."""
        given = self.given()
        return given if self.optim not in OWN_OPTIMIZERS else {k: v for k, v in given.items() if k != "optim"}

    @property
    def deciding(self) -> dict[str, Any]:
        """The fields that are set and decide what is learnt: part of a training stage's identity."""
        return {name: value for name, value in self.given().items() if name in DECIDING}


DECIDING = frozenset(
    {
        "optim",
        "optim_args",
        "lr_scheduler_kwargs",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
    }
)
"""The others change speed, memory and messages, as everything under `launch` does. Compiling is here because transformers
multiplies in tf32 with it, where it is not told otherwise."""

_STAGE = "set recipe.stages.<stage>."
_LOADER = "our data loader does not use it; set launch.num_workers for more of them"
_SAMPLER = "which samples make up a step is the recipe's: `data`, `global_batch` and `epochs`"
_EVALUATION = "evaluation is a stage of its own: choose benchmarks with eval=..."
_CHECKPOINTS = "checkpoints are our own: set launch.save_steps, launch.save_minutes or launch.keep_checkpoints"
_LOGGING = "set tracking.log_steps, tracking.tensorboard or tracking.wandb"
_RANKS = "choose launch=torchrun, zero2 or zero3, and set launch.nproc"
_HUB = "nothing is uploaded while training; tinylmm export writes a model to publish"
_MEMORY = "set launch.gradient_checkpointing"
_TRAINED = "tinylmm needs it as it is"

REFUSED: dict[str, str] = {
    "output_dir": "set store", "logging_dir": "set store", "overwrite_output_dir": "set store", "run_name": "set name",
    "project": "set tracking.wandb.project",
    "seed": "set seed", "data_seed": "set seed", "full_determinism": "set seed",
    "learning_rate": _STAGE + "lr", "weight_decay": _STAGE + "weight_decay", "adam_beta1": _STAGE + "adam_betas",
    "adam_beta2": _STAGE + "adam_betas", "adam_epsilon": _STAGE + "adam_epsilon",
    "max_grad_norm": _STAGE + "max_grad_norm", "num_train_epochs": _STAGE + "epochs",
    "max_steps": _STAGE + "max_steps", "lr_scheduler_type": _STAGE + "schedule",
    "warmup_steps": _STAGE + "warmup_ratio", "warmup_ratio": _STAGE + "warmup_ratio",
    "bf16": _STAGE + "precision", "fp16": _STAGE + "precision",
    "gradient_accumulation_steps": _STAGE + "global_batch", "train_batch_size": _STAGE + "global_batch",
    "per_device_train_batch_size": "set launch.micro_batch", "auto_find_batch_size": "set launch.micro_batch",
    "optim_target_modules": "our optimiser's groups are the parts of the model; low-rank optimisers need other ones",
    "label_smoothing_factor": "our loss does not use it",
    "neftune_noise_alpha": "embeddings are mixed with image features before the first block, where its noise is not added",
    "use_liger_kernel": "it is applied to models of transformers alone", "liger_kernel_config": "see use_liger_kernel",
    "use_cache": "no cache is kept in training", "average_tokens_across_devices": "our loss always counts over all ranks",
    "gradient_checkpointing": _MEMORY, "gradient_checkpointing_kwargs": _MEMORY, "activation_checkpointing": _MEMORY,
    "activation_checkpointing_kwargs": _MEMORY,
    "dataloader_num_workers": "set launch.num_workers", "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER, "dataloader_multiprocessing_context": _LOADER, "dataloader_in_order": _LOADER,
    "dataloader_drop_last": _SAMPLER, "train_sampling_strategy": _SAMPLER, "group_by_length": _SAMPLER,
    "length_column_name": _SAMPLER, "ignore_data_skip": "a resumed stage always goes on with its next batch",
    "do_train": "the recipe says what is trained", "remove_unused_columns": _TRAINED, "label_names": _TRAINED,
    "logging_strategy": _LOGGING, "logging_steps": _LOGGING, "logging_first_step": _LOGGING, "report_to": _LOGGING,
    "logging_nan_inf_filter": "a loss that is no number ends the stage",
    "debug": "a loss or gradient that is no number ends the stage, and its samples are named",
    "log_level_replica": "rank 0 logs for all",
    "log_on_each_node": "rank 0 logs for all", "include_num_input_tokens_seen": "metrics.jsonl has no row for it",
    "skip_memory_metrics": "metrics.jsonl has no row for it", "disable_tqdm": "tinylmm shows its own progress",
    "trackio_space_id": _LOGGING, "trackio_bucket_id": _LOGGING, "trackio_static_space_id": _LOGGING,
    "per_device_eval_batch_size": "set launch.eval_batch", "do_eval": _EVALUATION, "do_predict": _EVALUATION,
    "eval_strategy": _EVALUATION, "evaluation_strategy": _EVALUATION, "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION, "eval_on_start": _EVALUATION, "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION, "eval_use_gather_object": _EVALUATION, "prediction_loss_only": _EVALUATION,
    "bf16_full_eval": _EVALUATION, "fp16_full_eval": _EVALUATION, "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION, "load_best_model_at_end": _EVALUATION, "metric_for_best_model": _EVALUATION,
    "greater_is_better": _EVALUATION,
    "save_strategy": _CHECKPOINTS, "save_steps": _CHECKPOINTS, "save_total_limit": _CHECKPOINTS,
    "save_only_model": _CHECKPOINTS, "save_on_each_node": _CHECKPOINTS, "enable_jit_checkpoint": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    "resume_from_checkpoint": "the same command given again goes on from the last checkpoint",
    "use_cpu": "set launch.device", "no_cuda": "set launch.device", "ddp_timeout": "set launch.step_timeout_s",
    "ddp_backend": _RANKS, "local_rank": _RANKS, "deepspeed": _RANKS, "fsdp": _RANKS, "fsdp_config": _RANKS,
    "parallelism_config": _RANKS, "accelerator_config": _RANKS, "ddp_find_unused_parameters": _TRAINED,
    "ddp_broadcast_buffers": _TRAINED,
    "ddp_static_graph": "batches with and without images do not take the same way through the model",
    "push_to_hub": _HUB, "hub_model_id": _HUB, "hub_strategy": _HUB, "hub_always_push": _HUB, "hub_private_repo": _HUB,
    "hub_revision": _HUB,
}  # fmt: skip
"""Field of TrainingArguments -> why it may not be set, or what to set in its place."""


def refused_field(name: str) -> Fault:
    """Return the fault for a key of `trainer` that is not in TrainerSpec."""
    where, allowed = f"trainer.{name}", tuple(TrainerSpec.model_fields)
    if name in REFUSED:
        reason = REFUSED[name]
        if reason.startswith("set "):
            return Fault(where, "is set by tinylmm.", f"{reason[0].upper()}{reason[1:]} instead.")
        return Fault(where, f"may not be set: {reason}.")
    hint = suggestion(name.lower(), allowed) or suggestion(name.lower(), REFUSED)
    what = "is no field of transformers.TrainingArguments that does something here."
    return Fault(where, what, f"{hint} Allowed: {', '.join(allowed)}.".strip())
