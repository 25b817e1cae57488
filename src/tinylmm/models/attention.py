"""Which attention a model runs, and samples that share a row under flash-attn.

Models are loaded in fp32 on the CPU, where flash-attn's kernels cannot run: they start with PyTorch's own attention, and
`set_attention` turns to what was asked for once they are where and in what they compute.

SDPA and eager attention take a mask, which transformers makes of restarting positions, however many rows there are.
flash-attn takes no mask but the bounds of its sequences, and transformers guesses them in a batch of one row alone. `varlen`
is given the same bounds, runs everywhere and in any precision (`models/varlen.py`), and is what training chooses by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from tinylmm.config.attention import FLASH, VARLEN, no_flash
from tinylmm.models.fused import positions_read
from tinylmm.models.layout import Layout, sample_bounds
from tinylmm.models.varlen import attend_samples

REHEARSAL = "tinylmm_rehearsal"
"""Name under which transformers knows `_rehearse`."""

BY_SAMPLES = "tinylmm_varlen"
"""Name under which transformers knows `_attend`, which is `launch.attention=varlen`."""

BY_BOUNDS = (FLASH, REHEARSAL, BY_SAMPLES)
"""Attention implementations that take the bounds of sequences and no mask."""

LENGTHS = ("max_length_q", "max_length_k")
"""Transformers' arguments for the longest sample."""
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Transformers' arguments for where samples begin."""
LENGTH_STEP, SAMPLES_STEP = 512, 16
"""What the longest sample's bound and the number of samples are multiples of: kernels are planned for each number anew."""

KERNELS_FROM = (8, 0)
"""Compute capability that flash-attn 2 needs (Ampere)."""


def choose_attention(wanted: str, precision: str, device: torch.device) -> str:
    """Return the attention implementation for a model that computes in `precision` on `device`.

    Args:
        wanted: launch.attention; "auto" is flash-attn where it is installed and can compute this, else SDPA.
        precision: fp32, bf16 or fp16.
        device: where the model computes.

    Raises:
        ConfigError: flash-attn is asked for by name where it cannot compute.
    """
    if wanted == VARLEN:  # of samples that share rows, as only training lays them
        wanted = "auto"
    if wanted not in ("auto", FLASH):
        return wanted
    reason = why_no_flash(precision, device)
    if reason is None:
        return FLASH
    if wanted == FLASH:
        raise no_flash(reason)
    return "sdpa"


def choose_training_attention(wanted: str, precision: str, device: torch.device) -> str:
    """Return the attention implementation for a training, where samples share rows and nothing is cached.

    "auto" is varlen: on a CPU, and in fp32, no other is as fast, and on a GPU PyTorch's own kernels need nothing installed.

    Raises:
        ConfigError: flash-attn is asked for by name where it cannot compute.
    """
    return VARLEN if wanted in ("auto", VARLEN) else choose_attention(wanted, precision, device)


def why_no_flash(precision: str, device: torch.device) -> str | None:
    """Why flash-attn cannot compute in a precision on a device, the end of a sentence; None where it can."""
    if precision == "fp32":
        return "the precision of this stage is fp32"
    if device.type != "cuda":
        return f"this stage, in {precision} precision, runs on the {device.type.upper()}"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if torch.cuda.get_device_capability(device) < KERNELS_FROM:
        return f"{torch.cuda.get_device_name(device)} is older than its kernels"
    return None


def loading_attention(wanted: str) -> str:
    """The implementation that a part is loaded with: what was asked for, but for flash-attn, which `set_attention` turns on."""
    return wanted if wanted in ("sdpa", "eager") else "sdpa"


def exact_attention(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The attention that computes in any precision on any device: SDPA, or eager where SDPA would leave out a soft cap."""
    return "eager" if caps_scores(config) or not model_class._supports_sdpa else "sdpa"


def caps_scores(config: PreTrainedConfig) -> bool:
    """Whether a model caps its attention scores (Gemma 2)."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


@contextmanager
def without_flash(module: nn.Module) -> Iterator[None]:
    """Let the models in a module do without flash-attn for a while: to be tried in fp32, or on the CPU."""
    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    turned = {id(part.config): part for part in parts if part.config._attn_implementation == FLASH}
    for part in turned.values():
        part.config._attn_implementation = exact_attention(type(part), part.config)
    try:
        yield
    finally:
        for part in turned.values():
            part.config._attn_implementation = FLASH


def set_attention(part: PreTrainedModel, chosen: str) -> None:
    """Turn one part of a model to flash-attn if that was chosen and the part has it; else leave what it was loaded with."""
    if chosen == FLASH and part._supports_flash_attn:
        part.set_attn_implementation(FLASH)


def attend_by_samples(llm: PreTrainedModel) -> None:
    """Turn an LLM to varlen attention, unless it caps or drops attention scores, or its layers are not told bounds."""
    text = llm.config.get_text_config()
    rates = (getattr(text, name, 0.0) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    if llm._supports_sdpa and llm._supports_flash_attn and not caps_scores(llm.config) and not any(rates):
        llm.set_attn_implementation(BY_SAMPLES)


def decode_rows(decoder: nn.Module, embeddings: Tensor, position_ids: Tensor, layout: Layout | None = None) -> Tensor:
    """Last hidden states (R, L, D) of rows (R, L, D) that samples share; attention never crosses from one to the next.

    Args:
        decoder: the part of a causal LM that makes hidden states of embeddings.
        embeddings: (R, L, D).
        position_ids: (R, L) int64; a sample begins with each row and wherever they do not count on by one, and so does the
            padding at a row's end.
        layout: of the rows, where it is known already.
    """
    inputs: dict[str, Any] = {"inputs_embeds": embeddings, "position_ids": position_ids}
    used = decoder.config.get_text_config()._attn_implementation  # type: ignore[operator, union-attr]
    if used in BY_BOUNDS:
        # As one row, since some classes (StableLM) hand positions to their attention, but no bounds.
        inputs = {name: tensor.flatten(0, 1).unsqueeze(0) for name, tensor in inputs.items()}
        known = None if layout is None else as_arguments(layout["bounds"], layout["longest"])
        inputs |= known or bounds_of(position_ids)
        if used == BY_SAMPLES:
            inputs |= _rounded(inputs)
    # No attention mask: transformers makes it of the positions.
    hidden = cast(Tensor, decoder(**inputs, use_cache=False).last_hidden_state)
    return hidden.reshape(*position_ids.shape, -1)


def bounds_of(position_ids: Tensor) -> dict[str, Any]:
    """Where samples begin and end in rows laid end to end, as transformers' arguments for flash-attn."""
    bounds = sample_bounds(position_ids)
    return as_arguments(bounds, int(bounds.diff().max()))


def as_arguments(bounds: Tensor, longest: int) -> dict[str, Any]:
    """Bounds (samples + 1,) and the longest sample as transformers' arguments, for queries and keys.

    The length is a number, for the kernels want one: asked for once here, not in every layer.
    """
    return dict.fromkeys(BOUNDS, bounds) | dict.fromkeys(LENGTHS, longest)


def _rounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Bounds with empty samples behind the last one, and a longest sample, in numbers that few batches differ in."""
    bounds, longest = inputs[BOUNDS[0]], -(-inputs[LENGTHS[0]] // LENGTH_STEP) * LENGTH_STEP
    bounds = F.pad(bounds, (0, -(len(bounds) - 1) % SAMPLES_STEP), value=inputs["position_ids"].numel())
    return dict.fromkeys(BOUNDS, bounds) | dict.fromkeys(LENGTHS, longest)


def _rehearse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the bounds that reach an attention layer, or those its positions give, as flash-attn would.

    In any precision, on any device: it finds out whether a class hands them on. Heads are (B, H, L, E), the result is
    (B, L, H, E).
    """
    if cu_seq_lens_q is None and position_ids is not None and len(query) == 1:
        cu_seq_lens_q = bounds_of(position_ids)["cu_seq_lens_q"]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if cu_seq_lens_q is not None:
        numbers = torch.arange(len(cu_seq_lens_q) - 1, device=query.device)
        segments = numbers.repeat_interleave(cu_seq_lens_q.diff())
        mask &= segments[:, None] == segments
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return mixed.transpose(1, 2), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend_samples` as transformers calls it: heads (1, H, N, E), the result (1, N, H, E)."""
    if cu_seq_lens_q is None or max_length_q is None:
        if position_ids is None:
            raise ValueError(
                f"{type(module).__name__} is told neither bounds nor positions of samples; use attention=sdpa"
            )
        found = bounds_of(position_ids)
        cu_seq_lens_q, max_length_q = found["cu_seq_lens_q"], found["max_length_q"]
    # squeezed, not indexed: the gradient of an index is written into a row of zeros
    q, k, v = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    needed = positions_read(module)
    return attend_samples(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window, needed).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(BY_SAMPLES, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_SAMPLES, ALL_MASK_ATTENTION_FUNCTIONS[FLASH])
ALL_ATTENTION_FUNCTIONS.register(REHEARSAL, _rehearse)
ALL_MASK_ATTENTION_FUNCTIONS.register(REHEARSAL, ALL_MASK_ATTENTION_FUNCTIONS[FLASH])
