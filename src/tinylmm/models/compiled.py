"""`torch.compile` of each transformer block: the elementwise work of a block in a few kernels, with one compilation for all.

Blocks of a stack run the same code, so that one graph serves all of them: seconds of compiling where a whole model takes
minutes. Sizes that change from batch to batch (positions, samples, images) are symbols in that graph: it is never made anew.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Literal

import torch

from tinylmm.errors import ConfigError, Fault
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import decoder_blocks

log = logging.getLogger(__name__)

PAYS_FROM = 150.0
"""Seconds that a training must take without: compiling takes half a minute and saves a fifth."""


def why_not_compiled(device: torch.device) -> str | None:
    """Why blocks cannot be compiled for a device, the end of a sentence; None where they can."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    return None


def compiles(wanted: Literal["auto"] | bool, device: torch.device, seconds: float | None) -> bool:
    """Whether a training's blocks are to be compiled.

    Args:
        wanted: `launch.compile`.
        seconds: that the training takes at least; None where nobody knows.

    Raises:
        ConfigError: it is asked for where it cannot be had.
    """
    reason = why_not_compiled(device)
    if wanted is True and reason is not None:
        raise ConfigError(
            [Fault("launch.compile", f"is true, but {reason}.", "Install it, or leave launch.compile out.")]
        )
    if wanted != "auto":
        return wanted
    if device.type != "cuda" or (seconds is not None and seconds < PAYS_FROM):
        return False
    if reason is not None:
        log.warning("blocks are not compiled, which costs about a fifth of the speed: %s", reason)
    return reason is None


def compile_blocks(model: LMM) -> int:
    """Let a model's blocks be compiled when they first run, and return how many those are.

    The LLM's last block stays as it is: it computes some of its positions alone (`models/speed.py`). So do blocks in no
    list, whose classes bring code of their own.
    """
    try:
        blocks = list(decoder_blocks(model.llm))[:-1]
    except ValueError as error:
        log.info("the LLM's blocks are not compiled: %s", error)
        blocks = []
    blocks += list(model.vision_tower.blocks)
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far; what compiles them is not loaded for the answer."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else int(compiler.counters["stats"]["unique_graphs"])
