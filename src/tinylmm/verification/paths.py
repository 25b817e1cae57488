"""The fast paths of a training: one row a switch. No torch.

A row says which fields of the spec turn it on and off, and where it cannot run. `tinylmm verify` runs every row that this
machine can, each alone on top of a training with all of them off, and all that the user's configuration turns on together.
`tests/unit/verification/test_paths.py` holds that every field of `launch` and `trainer` is either in a row here or among
`NO_ARITHMETIC`, so that a new switch cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

from tinylmm.config.attention import FLASH
from tinylmm.config.launch import LaunchSpec

Fields = Mapping[str, Any]
"""`launch.packing` and the like -> value."""


@dataclass(frozen=True)
class Here:
    """What decides which paths can run.

    Attributes:
        device: `cpu` or `cuda`.
        gpus: that can be seen.
        precision: that the steps are compared in.
        samples: in a step.
        configured: the fields of the user's own launch and trainer.
        frozen_tower: whether nothing of the tower is trained.
    """

    device: Literal["cpu", "cuda"]
    gpus: int
    precision: str
    samples: int
    configured: Fields
    frozen_tower: bool


def _anywhere(here: Here) -> str:
    return ""


@dataclass(frozen=True)
class FastPath:
    """One switch, or several that only make sense together.

    Attributes:
        name: what a certificate calls it.
        on, off: fields; a micro-batch as its share of a step's samples (0 is one of them), the length of a row as one of
            `max_length`.
        blocked: why it cannot run here, the end of a sentence; empty where it can.
        cut: break the training off behind this step, and let the same command continue it.
        shares_rows: it proves nothing unless samples share a row.
        exact: its steps must be those with the path off, bit by bit, where fp32 on a CPU computes them.
    """

    name: str
    on: Fields
    off: Fields
    blocked: Callable[[Here], str] = _anywhere
    cut: int | None = None
    shares_rows: bool = False
    exact: bool = False


def _no_flash(here: Here) -> str:
    if here.device != "cuda":
        return "flash-attn computes on a GPU alone, and there is none"
    if here.precision == "fp32":
        return "flash-attn computes in bf16 and fp16, and this stage in fp32"
    return "" if find_spec("flash_attn") else "flash-attn is not installed"


def _kernels(attention: str) -> Callable[[Here], str]:
    return _no_flash if attention == FLASH else _anywhere


def _tower_is_trained(here: Here) -> str:
    return "" if here.frozen_tower else "the tower is trained, so its features change at every step"


def _not_compiled(here: Here) -> str:
    asked = here.configured.get("trainer.torch_compile")
    return "" if asked else "this configuration compiles nothing (trainer.torch_compile=true)"


def _blocks_not_compiled(here: Here) -> str:
    if here.device == "cuda":
        return "" if find_spec("triton") else "triton is not installed"
    asked = here.configured.get("launch.compile") is True
    return "" if asked else "blocks are compiled on a GPU alone, unless a CPU is told to (launch.compile=true)"


def _too_few_gpus(here: Here) -> str:
    return f"two ranks need two GPUs, and there is {here.gpus}" if here.device == "cuda" and here.gpus < 2 else ""


def _one_sample(here: Here) -> str:
    return "" if here.samples > 1 else "a step has one sample (raise --samples)"


PATHS = (
    FastPath(
        "packing",
        {"launch.packing": True, "launch.row_tokens": 2.0, "launch.micro_batch": 0.5, "launch.attention": "auto"},
        {"launch.packing": False, "launch.row_tokens": None, "launch.micro_batch": 0.0, "launch.attention": "eager"},
        _one_sample,
        shares_rows=True,
    ),
    *(
        FastPath(f"attention: {name}", {"launch.attention": name}, {"launch.attention": "eager"}, _kernels(name))
        for name in get_args(LaunchSpec.model_fields["attention"].annotation)
        if name not in ("auto", "eager")
    ),
    FastPath("feature cache", {"launch.cache_features": True}, {"launch.cache_features": False}, _tower_is_trained),
    FastPath("pixel cache", {"launch.cache_pixels": True}, {"launch.cache_pixels": False}, exact=True),
    FastPath(
        "positions of a row",
        {"launch.packing": True, "launch.row_tokens": 2.0, "launch.micro_batch": "auto", "launch.attention": "auto"},
        {"launch.packing": False, "launch.row_tokens": None, "launch.micro_batch": 0.0, "launch.attention": "eager"},
        _one_sample,
        shares_rows=True,
    ),
    FastPath("micro-batch", {"launch.micro_batch": 1.0}, {"launch.micro_batch": 0.0}, _one_sample),
    FastPath("accumulation", {"launch.micro_batch": 0.25}, {"launch.micro_batch": 0.0}, _one_sample),
    FastPath("checkpointing", {"launch.gradient_checkpointing": True}, {"launch.gradient_checkpointing": False}),
    FastPath("reading processes", {"launch.num_workers": 2}, {"launch.num_workers": 0}, exact=True),
    FastPath("compiled blocks", {"launch.compile": True}, {"launch.compile": False}, _blocks_not_compiled),
    FastPath("compile", {"trainer.torch_compile": True}, {"trainer.torch_compile": None}, _not_compiled),
    FastPath("resume", {"launch.save_steps": 1}, {"launch.save_steps": 500}, cut=2, exact=True),
    FastPath(
        "ranks",
        {"launch.backend": "torchrun", "launch.nproc": 2},
        {"launch.backend": "local", "launch.nproc": 1, "launch.nodes": 1, "launch.deepspeed_stage": None},
        _too_few_gpus,
    ),
)
"""The supervised-only logits are in every training and so in every row: the reference has logits at every position."""

ALWAYS_ON = ("supervised-only logits",)
"""Paths without a switch: off is the reference alone."""

NO_ARITHMETIC = {
    "launch.rendezvous", "launch.slurm", "launch.slots", "launch.device", "launch.cache_features_gib",
    "launch.cache_pixels_gib",
    "launch.save_minutes", "launch.keep_checkpoints", "launch.start_timeout_s", "launch.step_timeout_s",
    "launch.save_timeout_s", "launch.zero3_whole_below", "launch.eval_batch", "launch.eval_tokens", "launch.gpu",
    "launch.price", "trainer.optim", "trainer.optim_args", "trainer.lr_scheduler_kwargs", "trainer.tf32",
    "trainer.torch_compile_backend", "trainer.torch_compile_mode", "trainer.torch_empty_cache_steps",
    "trainer.dataloader_pin_memory", "trainer.ddp_bucket_cap_mb", "trainer.log_level",
}  # fmt: skip
"""Fields that no row needs: they say where and when, what is learnt (as both sides have them), or go with another field."""


def all_off() -> dict[str, Any]:
    """The fields of a training with every fast path off."""
    return {name: value for path in PATHS for name, value in path.off.items()}
