"""What is said where flash-attn is asked for by name and cannot compute; planning says it before models can."""

from __future__ import annotations

from tinylmm.errors import ConfigError, Fault

FLASH = "flash_attention_2"
VARLEN = "varlen"
"""Of samples end to end, each by itself, with PyTorch's own kernels; what a training chooses by itself."""


def no_flash(reason: str) -> ConfigError:
    """The error, with the reason as the end of a sentence."""
    what = f"is {FLASH}, which computes in bf16 and fp16 on a GPU alone, but {reason}."
    return ConfigError([Fault("launch.attention", what, "Set launch.attention=auto, which takes it where it can.")])
