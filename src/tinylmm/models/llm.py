"""Loading a causal LM so that what the spec says and what is run are the same, and using it piecewise as the LMM does.

The LMM calls a causal LM in three pieces: `get_input_embeddings()`, the decoder from embeddings to last hidden states, and
the head at supervised positions only. For the classes that conf/llm names, tests hold that the pieces make the whole.
For any other (`llm=hf`), `examine` tries it once, on a handful of tokens, before anything is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tinylmm.config.attention import FLASH
from tinylmm.errors import ConfigError, Fault, UserError
from tinylmm.models import openelm  # noqa: F401  registers its classes with transformers
from tinylmm.models.attention import REHEARSAL, caps_scores, decode_rows, exact_attention, without_flash
from tinylmm.models.fused_loss import Shaping

PACKS = "tinylmm_packs"
"""Attribute of an examined LLM: the attention implementations under which samples that share a row stay apart."""

FREE_FIELDS = {"max_position_embeddings", "max_context_length", "rope_max_length", "initializer_range", "use_cache"}
"""Fields of an architecture that decide nothing about a trained checkpoint's numbers; token ids are others."""

TRIED = 7
"""Tokens in each of the rows that `examine` tries."""

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number, that counts as rounding (fp32)."""


class HubCausalLM(PreTrainedModel):
    """Stands in a spec for whatever causal LM of transformers lies at `pretrained` (`llm=hf`); never instantiated."""


def load_llm(
    target: type[PreTrainedModel],
    where: str | Path,
    revision: str | None,
    attention: str,
    architecture: Mapping[str, Any] | None = None,
    local_only: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """Load a causal LM in fp32 on the CPU.

    Args:
        target: its class, or HubCausalLM to take the class from the checkpoint.
        where: hub id or folder.
        revision: commit of the hub repository.
        attention: what was asked for; see `llm_attention`.
        architecture: the spec's fields. Dropout rates are set from it, all others must be the checkpoint's own; None
            (a folder that tinylmm wrote) takes the checkpoint's as they are.
        local_only: never ask the hub.
        weights: without them its parameters are on the meta device, for another rank to send.

    Raises:
        OSError: the weights are not to be had.
        UserError: the checkpoint is of another class or shape than the spec says, or its class cannot be used.
    """
    model_class, config = _class_and_config(target, where, {"revision": revision, "local_files_only": local_only})
    if architecture is not None:
        reconcile(config, architecture, str(where))
    implementation = llm_attention(model_class, config, attention)
    if not weights:
        return _shapes_of(model_class, config, implementation)
    llm = model_class.from_pretrained(
        where,
        config=config,
        revision=revision,
        local_files_only=local_only,
        attn_implementation=implementation,
        dtype=torch.float32,
    )
    # Generation is greedy and says so itself: penalties, lengths and caches that a checkpoint asks for would bend answers.
    ids = {key: getattr(llm.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llm.generation_config = GenerationConfig(**ids)
    return examine(llm) if target is HubCausalLM else llm


def _shapes_of(model_class: type[PreTrainedModel], config: Any, implementation: str) -> PreTrainedModel:
    """The model with real buffers, which are computed, and parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        llm = model_class._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    llm.tie_weights()  # each parameter was replaced by one of its own
    return llm


def random_llm(target: type[PreTrainedModel], architecture: Mapping[str, Any], attention: str) -> PreTrainedModel:
    """Make a causal LM with random weights, in fp32 on the CPU.

    Raises:
        ConfigError: `target` is HubCausalLM and the architecture names no `model_type`.
        UserError: as `load_llm`.
    """
    model_class: type[PreTrainedModel]
    if target is HubCausalLM:
        if "model_type" not in architecture:
            what = "is random, but nothing says what to build: llm=hf takes its architecture from a checkpoint."
            fix = (
                "Choose another llm, or set llm.architecture with its model_type (a transformers name, such as llama)."
            )
            raise ConfigError([Fault("llm.init", what, fix)])
        config = _config_for(dict(architecture))
        model_class = _causal_lm_class(config, f"model_type {architecture['model_type']}")
    else:
        model_class, config = target, _make_config(target.config_class, architecture)
    implementation = llm_attention(model_class, config, attention)
    llm = model_class._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    return examine(llm) if target is HubCausalLM else llm


def llm_attention(model_class: type[PreTrainedModel], config: PreTrainedConfig, wanted: str) -> str:
    """Return the attention implementation with which an LLM is loaded, in fp32 on the CPU; `set_attention` may follow.

    SDPA knows no soft cap on scores (Gemma 2): eager takes its place.

    Raises:
        UserError: what was asked for by name is not to be had, or would compute something else.
    """
    if wanted == FLASH and not model_class._supports_flash_attn:
        raise _not_had(wanted, model_class, "has no flash-attn implementation")
    if wanted == "eager":
        return wanted
    exact = exact_attention(model_class, config)
    if wanted == "sdpa" and exact != wanted:
        cannot = "caps its attention scores, which SDPA cannot"
        raise _not_had(wanted, model_class, cannot if caps_scores(config) else "has no SDPA implementation")
    return exact


def _not_had(wanted: str, model_class: type[PreTrainedModel], reason: str) -> UserError:
    other = "auto or sdpa" if wanted == FLASH else "auto or eager"
    return UserError(
        f"launch.attention is {wanted}, but {model_class.__name__} {reason}. Set launch.attention to {other}."
    )


def reconcile(config: PreTrainedConfig, architecture: Mapping[str, Any], where: str) -> None:
    """Set a checkpoint's dropout rates as the spec says, and check that the spec's other fields are the checkpoint's.

    Raises:
        UserError: they differ; what was planned would not be what is run.
    """
    wanted = _make_config(type(config), architecture)
    differing = []
    for key in architecture:
        if key.endswith(("dropout", "_pdrop")) and hasattr(config, key):
            setattr(config, key, getattr(wanted, key))
        elif key not in FREE_FIELDS and not key.endswith("_token_id"):
            asked, found = getattr(wanted, key), getattr(config, key, None)
            if not _agrees(asked, found):
                differing.append(f"{key} is {asked} in llm.architecture and {found} in the checkpoint")
    if differing:
        raise UserError(
            f"llm: the checkpoint '{where}' is not what the spec describes: {'; '.join(differing)}. Set llm.architecture "
            "to the checkpoint's numbers, or use llm=hf, which reads them from it."
        )


def decoder_of(llm: nn.Module) -> nn.Module:
    """Return the part of a causal LM that makes last hidden states of input embeddings."""
    return cast(nn.Module, llm.get_decoder())  # type: ignore[operator]


def head_logits(llm: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a causal LM's head as its own forward does: (S, D) hidden states to (S, V) logits in fp32.

    A head's bias (Phi) is the head's own; a factor (Cohere, Granite) or soft cap (Gemma 2) is named by the config.
    """
    return shaping_of(llm)(cast(Tensor, llm.get_output_embeddings()(hidden).float()))  # type: ignore[operator]


def shaping_of(llm: nn.Module) -> Shaping:
    """What a causal LM's config says is done to its logits."""
    config = llm.config.get_text_config()  # type: ignore[operator, union-attr]
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    factor = (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
    return Shaping(factor, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def examine(llm: PreTrainedModel) -> PreTrainedModel:
    """Try once whether a causal LM's pieces make the whole, and note under what it can share rows (`PACKS`); returns it.

    Raises:
        UserError: its class takes no embeddings or positions, or its logits are not its head at its decoder's output.
    """
    training = llm.training
    llm.eval()
    name = type(llm).__name__
    try:
        with without_flash(llm):
            ids = torch.arange(2 * TRIED).view(2, TRIED) % llm.get_input_embeddings().weight.shape[0]
            embeddings = llm.get_input_embeddings()(ids)
            whole = llm(inputs_embeds=embeddings, use_cache=False).logits.float()
            pieces = head_logits(llm, _hidden(llm, embeddings, torch.arange(TRIED).expand(2, -1)))
            kinds = [llm.config._attn_implementation, *([FLASH] if llm._supports_flash_attn else [])]
            packs = {kind for kind in kinds if _keeps_apart(llm, embeddings, kind)}
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"llm: {name} cannot be given image features ({reason}). It must take inputs_embeds and position_ids, and have "
            "a decoder and a head of its own; choose another llm."
        ) from error
    if not _close(pieces, whole):
        raise UserError(
            f"llm: {name} does more to its logits than its head does (difference {float((pieces - whole).abs().max()):.3g}), "
            "so its loss cannot be computed at supervised positions alone. Choose another llm."
        )
    setattr(llm, PACKS, frozenset(packs))
    return llm.train(training)


def _keeps_apart(llm: PreTrainedModel, embeddings: Tensor, attention: str) -> bool:
    """Whether samples in several rows, (2, TRIED, D), come out as each does alone; flash-attn is rehearsed."""
    own = llm.config._attn_implementation
    llm.config._attn_implementation = REHEARSAL if attention == FLASH else attention  # of configs inside it too
    try:
        cuts = (3, 5)
        positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(TRIED - cut)]) for cut in cuts])
        packed = _hidden(llm, embeddings, positions)
        for row, cut in enumerate(cuts):
            for part in (slice(cut), slice(cut, TRIED)):
                alone = _hidden(llm, embeddings[row : row + 1, part], positions[row : row + 1, part])
                if not _close(packed[row : row + 1, part], alone):
                    return False
        return True
    finally:
        llm.config._attn_implementation = own


def _hidden(llm: PreTrainedModel, embeddings: Tensor, positions: Tensor) -> Tensor:
    decoder = decoder_of(llm)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise TypeError(f"{type(decoder).__name__} takes no position_ids")
    return decode_rows(decoder, embeddings, positions)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max())


def _agrees(asked: Any, found: Any) -> bool:
    """Equal, where every key that is asked for counts and further ones do not."""
    if isinstance(asked, Mapping) and isinstance(found, Mapping):
        return all(_agrees(value, found.get(key)) for key, value in asked.items())
    return bool(asked == found)


def _class_and_config(
    target: type[PreTrainedModel], where: str | Path, options: dict[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    fields, _ = PreTrainedConfig.get_config_dict(where, **options)
    if not fields:
        raise OSError(f"{where} has no config.json")
    found = fields.get("model_type")
    if target is HubCausalLM:
        config = _config_for(fields)
        return _causal_lm_class(config, f"'{where}'"), config
    if found not in (None, target.config_class.model_type):
        raise UserError(
            f"llm: the checkpoint '{where}' is a model of type '{found}', but llm._target_ is {target.__name__} "
            f"('{target.config_class.model_type}'). Use llm=hf, which takes the class from the checkpoint."
        )
    return target, _make_config(target.config_class, fields)


def _make_config(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config object of a spec's architecture or of a config.json, without what would name its class or its code."""
    try:
        return config_class(**{key: value for key, value in fields.items() if key not in ("model_type", "auto_map")})
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Fault("llm.architecture", f"is no {config_class.__name__}: {reason}")]) from error


def _config_for(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config object of a config.json's fields; code that the checkpoint may name is not run."""
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"llm: the installed transformers knows no model of type '{model_type}', and code that comes with a checkpoint "
            "is never run. Update transformers, or choose another llm."
        )
    return _make_config(CONFIG_MAPPING[model_type], fields)


def _causal_lm_class(config: PreTrainedConfig, what: str) -> type[PreTrainedModel]:
    try:
        return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    except KeyError as error:
        raise UserError(
            f"llm: {what} is of type '{config.model_type}', which transformers has no causal language model of. "
            "Choose a text-only decoder."
        ) from error
