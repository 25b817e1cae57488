"""On which device and in which number type a model runs; a missing GPU is an error where one is needed or named."""

from __future__ import annotations

import os

import torch
from torch import nn

from tinylmm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number types by the names that recipes and commands have for them."""


def precision_on(device: torch.device, wanted: str = "auto") -> str:
    """What a model that nobody trains computes in where nothing else is said (`auto`): bf16 on a GPU, else fp32."""
    return wanted if wanted != "auto" else "bf16" if device.type == "cuda" else "fp32"


ROTARY = "inv_freq"
"""In the names of buffers with rotary frequencies, `inv_freq` and `original_inv_freq`."""


def to_precision(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device and cast it, but keep rotary frequencies in the type they are in, as transformers does.

    Rounded to bf16, a frequency is off by up to 0.2 %: at position 700 a fast angle is then off by as much as a radian.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if ROTARY in name.rpartition(".")[2]}
    model.to(device, dtype)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)


def named_device(wanted: str) -> torch.device:
    """Return the device that a user names outside of a stage.

    Args:
        wanted: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1", or "mps" (Apple's GPUs; what is computed
            there has not been compared with the other devices).

    Raises:
        UserError: a GPU is named and none is there, or there is no such device.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if found else "cpu")
    name, _, number = wanted.partition(":")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(
                f"device is 'mps', but torch {torch.__version__} finds no Apple GPU on this machine. Use device=cpu."
            )
        return torch.device("mps")
    if name not in ("cpu", "cuda") or (number and not (name == "cuda" and number.isdigit())):
        raise UserError(f"device is '{wanted}'; allowed: auto, cpu, cuda, cuda:N and mps.")
    if name == "cuda" and not found:
        raise UserError(f"device is '{wanted}', but no CUDA GPU was found (torch {torch.__version__}). Use device=cpu.")
    if name == "cuda" and int(number or 0) >= found:
        raise UserError(f"device is '{wanted}', but only {found} CUDA GPUs were found, counted from 0.")
    return torch.device(wanted)


def choose_device(wanted: str, precision: str) -> torch.device:
    """Return the device for this rank.

    Args:
        wanted: launch.device, "auto", "cpu" or "cuda".
        precision: the stage's; bf16 and fp16 are meant for a GPU.

    Raises:
        UserError: the stage needs a GPU and none is there.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not found:
        raise UserError(
            f"launch.device=cuda, but no CUDA GPU was found (torch {torch.__version__}). "
            "Use launch.device=cpu, or install a CUDA build of torch."
        )
    if wanted == "auto" and precision != "fp32" and not found:
        raise UserError(
            f"this stage computes in {precision}, which is meant for a GPU, "
            f"and no CUDA GPU was found (torch {torch.__version__}). "
            f"Say launch.device=cpu to run it on the CPU all the same, or set the stage's precision to fp32."
        )
    if wanted == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
