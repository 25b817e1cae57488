"""Which device a stage runs on; a GPU that is needed and missing is an error, never a silent CPU run."""

from __future__ import annotations

import os

import torch

from tinylmm.errors import UserError


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
            f"this stage trains in {precision}, which is meant for a GPU, "
            f"and no CUDA GPU was found (torch {torch.__version__}). "
            f"Say launch.device=cpu to run it on the CPU all the same, or set the stage's precision to fp32."
        )
    if wanted == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
