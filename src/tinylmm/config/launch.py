"""How and where stages are run: `launch` of a run. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tinylmm.config.fields import Frozen, Positive
from tinylmm.config.gpus import ranks_here, visible_gpus

ROW_TOKENS = {"cpu": 1024, "gpu": 4096}
"""Positions that a rank takes at once where nothing else is said: what a CPU's caches hold of a layer; and what keeps a GPU
busy whose memory nobody knows. Where it is known, `planning/choose.py` goes by it."""


class SlurmSpec(Frozen):
    """What is asked of SLURM for each stage's job. The launch's `nodes` and `nproc` (GPUs of a node) are asked for with it."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    hours: Annotated[float, Field(gt=0)] = 24.0
    """Time limit of a job. A stage that it ends is saved, queued again and continued."""
    warn_minutes: Annotated[float, Field(gt=0)] = 3.0
    """So long before its limit (and before it is preempted, where SLURM says so) a job is told to save."""
    requeues: Annotated[int, Field(ge=0)] = 100
    """How often a job that ran out of time is queued again."""
    limit: Positive = 32
    """Most jobs of one command at once."""
    cpus: Positive | None = None
    """Cores of a node; by default what the cluster gives."""
    mem_gb: Positive | None = None
    """Memory of a node; by default what the cluster gives."""
    setup: list[str] = Field(default_factory=list)
    """Lines of shell before the job's own command (`module load ...`)."""
    options: dict[str, str] = Field(default_factory=dict)
    """Further options of sbatch by their long names (`constraint: a100`)."""


class LaunchSpec(Frozen):
    """How stages are run. Nothing here decides a result, so nothing here is part of a digest."""

    backend: str = "local"
    """Module of `launch/backends/`, or the class of a backend of your own by its dotted path."""
    nproc: Positive = 1
    """Ranks on each machine. `auto` is one a GPU that can be seen, and becomes that number here."""
    nodes: Positive = 1
    """Machines that a training or an evaluation is spread over, which share the store's disk: the same command is given on
    each, or `slurm` does that."""
    rendezvous: str | None = None
    """HOST:PORT at which they find each other; by default whichever machine begins a stage, at a free port."""
    slurm: SlurmSpec | None = None
    """Where set, every stage becomes a job of SLURM."""
    slots: Literal["auto"] | Positive = "auto"
    """Stages that run side by side, each on GPUs of its own or with its share of the CPU's cores. `auto` is as many as the GPUs
    that can be seen have room for, each with `nproc`, and one without a GPU."""
    deepspeed_stage: Literal["auto", 2, 3] | None = None
    """`auto` shares a training's state out over the ranks where the memory plan says that it has to, and DeepSpeed is there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is the GPU where there is one; a bf16 or fp16 stage then refuses to run on a CPU."""
    micro_batch: Literal["auto"] | Positive = "auto"
    """Samples a rank takes through the model at once; gradient accumulation makes up the rest of `global_batch`. `auto` takes
    as many as have `row_tokens` positions in all."""
    packing: bool = True
    """Put several samples into one row (attention never crosses them)."""
    row_tokens: Literal["auto"] | Positive = "auto"
    """Positions that a rank takes at once, samples end to end, image tokens counted in; with a number for `micro_batch` the
    length of a packed row, by default the stage's `max_length`. `auto` is 1,024 on a CPU, whose caches hold a layer of them;
    on a GPU the most, up to 16,384, that the memory plan finds room for."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that prepare data, and processes a rank that read images for it; 0 does both in the process itself. `auto` is
    all cores to prepare, and for a training on a GPU a rank's share of them."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Of a training, `auto` is `varlen`: each sample of a row by itself, by PyTorch's own kernels and without a mask. Of an
    evaluation it is flash-attn for bf16 or fp16 on a GPU where it is installed, else SDPA. Where scores are capped (Gemma 2) it
    is eager."""
    compile: Literal["auto"] | bool = "auto"
    """Compile each transformer block of a training (`torch.compile`): fewer passes over memory, the same numbers up to
    rounding. `auto` does it on a GPU for a stage that is long enough to win back the half minute that it takes."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass: less memory, more time. `auto` does where the memory plan says so."""
    cache_features: bool = True
    """Compute a frozen tower's features once and keep them on disk."""
    cache_features_gib: Annotated[float, Field(gt=0)] = 20.0
    """Above this estimated size the features are computed at every step instead."""
    cache_pixels: Literal["auto"] | bool = "auto"
    """Keep images as the transform leaves them, before they are normalised, for later epochs and for whichever training reads
    the same images through the same transform. `auto` does where a training reads its images more than once and all of them
    have room, or where some are kept already; never where features are kept."""
    cache_pixels_gib: Annotated[float, Field(gt=0)] = 20.0
    """Most that the store's kept images take together; further ones are decoded whenever they are read."""
    save_steps: Positive = 500
    """Checkpoint every so many optimiser steps, and"""
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    """at least this often."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    start_timeout_s: Positive = 600
    step_timeout_s: Positive = 300
    save_timeout_s: Positive = 3600
    zero3_whole_below: Annotated[int, Field(ge=0)] = 100_000
    """Parameters of fewer elements are not spread over the ranks by ZeRO-3 (DeepSpeed's persistence threshold)."""
    eval_batch: Positive = 64
    """Most questions answered at once, and"""
    eval_tokens: Positive = 32768
    """most tokens, of prompts and answers, that this may take; about as many again are kept of images asked about."""
    gpu: Literal["auto", "h100", "h200", "a100_80", "a100_40", "l40s", "rtx4090", "rtx3090"] = "auto"
    """For `tinylmm plan` alone: the card it reckons with (`sizing/cards.yaml`); `auto` is this machine's."""
    price: Annotated[float, Field(gt=0)] | None = None
    """For `tinylmm plan` alone: money for an hour of one GPU, in any currency."""

    @field_validator("rendezvous")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"[^\s:]+:\d{1,5}", value) is None:
            raise ValueError("must be HOST:PORT, a name that all machines reach and an open port there: node1:29500")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_rank_a_gpu(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        counted: dict[str, Any] = {
            name: "auto" for name in ("micro_batch", "row_tokens") if fields.get(name, "") is None
        }
        if fields.get("nproc") == "auto":
            counted["nproc"] = ranks_here(str(fields.get("device", "auto")))
        return fields | counted

    @model_validator(mode="after")
    def _ranks_need_torchrun(self) -> LaunchSpec:
        if self.backend == "local" and (self.ranks > 1 or self.sharding is not None):
            raise ValueError("several ranks or DeepSpeed need backend=torchrun: choose launch=torchrun, zero2 or zero3")
        if self.nodes > 1 and self.slots not in ("auto", 1):
            raise ValueError(
                "slots are places on one machine; with nodes above 1 a stage takes them all: leave slots out"
            )
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether stages that use ranks run on GPUs: as `device` says, or where SLURM gives them some, or some are here."""
        return self.device == "cuda" or (self.device == "auto" and (self.slurm is not None or visible_gpus() > 0))

    def positions(self, on_gpu: bool) -> int | None:
        """Positions that a rank takes at once; None where micro-batches are counted in samples."""
        if self.micro_batch != "auto":
            return None
        return self.row_tokens if self.row_tokens != "auto" else ROW_TOKENS["gpu" if on_gpu else "cpu"]

    @property
    def sharding(self) -> Literal[2, 3] | None:
        """Stage of ZeRO; None where there is none, or where no plan has chosen yet."""
        return None if self.deepspeed_stage == "auto" else self.deepspeed_stage

    @property
    def checkpoints(self) -> bool:
        """Whether activations are computed again; not where no plan has chosen yet."""
        return self.gradient_checkpointing is True

    @property
    def ranks(self) -> int:
        """Ranks of a training, on all machines together."""
        return self.nodes * self.nproc
