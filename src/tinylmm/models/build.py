"""Build an LMM from the identities of its parts: published weights, random ones, or a finished part-building stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tinylmm.config.targets import resolve_target
from tinylmm.errors import ConfigError, Fault, UserError
from tinylmm.models.anyres import with_tiles
from tinylmm.models.connectors import Connector
from tinylmm.models.encoders import HubEncoder, refuse_other_normalisation
from tinylmm.models.llm import choose_attention, load_llm, random_llm
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower, make_tower

PART_FILE = "part.json"
"""Identity of a part beside its Hugging Face files, written by the part-building stages."""


def build_lmm(
    spec: dict[str, Any],
    parents: dict[str, Path],
    folders: dict[str, str],
    template: str,
    seed: int,
    trust: list[str],
    attention: str = "auto",
) -> LMM:
    """Put an LMM together for the first training stage.

    Args:
        spec: holds `connector`, `tower_output` and, for parts that no stage built, `llm` and `vision_tower` identities.
        parents: role -> output folder of the stage that built the part.
        folders: role -> local folder of published weights, where they do not come from the hub.
        template: chat template's name.
        seed: draws the connector (and parts with init=random).
        attention: transformers' attention implementation; "auto" is flash-attn where it can be imported on a GPU, else SDPA.

    Raises:
        UserError: weights are not to be had, or the widths do not fit the connector.
    """
    torch.manual_seed(seed)
    llm = _load_llm(spec, parents, folders, trust, attention)
    encoder = _load_part("vision_tower", spec, parents, folders, trust, choose_attention(attention))
    tower_class = resolve_target(
        _identity("vision_tower", spec, parents)["_target_"], trust, nn.Module, role="vision_tower"
    )
    image = _identity("vision_tower", spec, parents)["image"]
    tower = make_tower(tower_class, encoder, spec["tower_output"], image)
    # Drawn after the parts, from the seed alone: whether a part is random or loaded does not move the connector.
    torch.manual_seed(seed)
    connector = build_connector(spec["connector"], tower.hidden_size, llm, trust)
    check_fit(tower, connector)
    connector = with_tiles(connector, image, tower.num_tokens)
    return LMM(llm, tower, connector, template, bool(spec.get("scale_image_features")))


def build_connector(spec: dict[str, Any], vision_dim: int, llm: nn.Module, trust: list[str]) -> Connector:
    """Build a connector between a tower of width `vision_dim` and the LLM's input embeddings."""
    llm_dim = llm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    connector_class = resolve_target(spec["_target_"], trust, Connector, role="connector")
    try:
        return cast(Connector, connector_class(vision_dim, llm_dim, **spec.get("options", {})))
    except (TypeError, ValueError) as error:
        raise ConfigError([Fault("connector", str(error))]) from error


def check_fit(tower: HFVisionTower, connector: Connector) -> None:
    """Refuse a connector that cannot take the tower's tokens.

    Raises:
        ConfigError: it folds a grid that is none, or expects tokens of two encoders from a tower with one.
    """
    if connector.streams not in (1, tower.streams):
        what = f"{type(connector).__name__} takes tokens of {connector.streams} encoders, but this tower has one."
        raise ConfigError([Fault("connector", what, "Set vision_tower=mof, or choose connector=mlp.")])
    try:
        connector.num_tokens(tower.num_tokens)
    except ValueError as error:
        raise ConfigError([Fault("connector", f"{error}.")]) from error


def load_tokenizer(spec: dict[str, Any], parents: dict[str, Path], folders: dict[str, str]) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer from its part stage, or by hub id; it always has a padding token afterwards."""
    where: str | Path | None = parents.get("tokenizer")
    revision, pad_token = None, None
    if where is None:
        source = spec["tokenizer"]
        where = folders.get("tokenizer", source["pretrained"])
        revision, pad_token = source["revision"], source["pad_token"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer '{where}' (revision {revision}) cannot be loaded: {str(error).splitlines()[0]} "
            "Check llm.tokenizer, and that the hub can be reached or the files are in its local cache."
        ) from error
    if pad_token is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        raise UserError(f"tokenizer {where} has no padding token; set llm.tokenizer.pad_token to one of its tokens")
    return tokenizer


def part_folder_identity(folder: Path) -> dict[str, Any]:
    """Read the identity that a part-building stage left beside its weights."""
    return cast(dict[str, Any], json.loads((folder / PART_FILE).read_text(encoding="utf-8")))


def _identity(role: str, spec: dict[str, Any], parents: dict[str, Path]) -> dict[str, Any]:
    return part_folder_identity(parents[role]) if role in parents else cast(dict[str, Any], spec[role])


def _load_llm(
    spec: dict[str, Any], parents: dict[str, Path], folders: dict[str, str], trust: list[str], attention: str
) -> PreTrainedModel:
    identity = _identity("llm", spec, parents)
    target = cast(type[PreTrainedModel], resolve_target(identity["_target_"], trust, PreTrainedModel, role="llm"))
    if "llm" in parents:
        return load_llm(target, parents["llm"], None, attention, local_only=True)
    if identity["init"] == "random":
        return random_llm(target, identity["architecture"], attention)
    where = folders.get("llm", identity["pretrained"])
    try:
        return load_llm(target, where, identity["revision"], attention, identity["architecture"])
    except OSError as error:
        raise _unavailable("llm", where, error) from error


def _load_part(
    role: str,
    spec: dict[str, Any],
    parents: dict[str, Path],
    folders: dict[str, str],
    trust: list[str],
    implementation: str,
) -> PreTrainedModel:
    identity = _identity(role, spec, parents)
    found = resolve_target(identity["encoder"], trust, PreTrainedModel, role="encoder")
    model_class = cast(type[PreTrainedModel], found)
    options: dict[str, Any] = {"attn_implementation": implementation, "dtype": torch.float32}
    if role in parents:
        return model_class.from_pretrained(parents[role], local_files_only=True, **options)
    if identity["init"] == "random":
        if model_class.config_class is None:
            what = f"is random, but {model_class.__name__} stands for whatever class the checkpoint names."
            raise ConfigError([Fault(f"{role}.init", what, f"Choose a {role} whose YAML has an architecture.")])
        config = model_class.config_class(**identity["architecture"])
        return cast(PreTrainedModel, model_class._from_config(config, **options))
    where = folders.get(role, identity["pretrained"])
    try:
        if model_class is HubEncoder:
            refuse_other_normalisation(where, identity["revision"], identity["image"])
        return model_class.from_pretrained(where, revision=identity["revision"], **options)
    except OSError as error:
        raise _unavailable(role, where, error) from error
    except ValueError as error:
        raise ConfigError([Fault(f"{role}.pretrained", str(error))]) from error


def _unavailable(role: str, where: str, error: OSError) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"{role}: the weights of '{where}' cannot be loaded ({reason}). "
        f"Download them with `hf download {where}` on a machine with network, or give a local folder as {role}.pretrained, "
        f"or start from random weights with {role}.init=random."
    )
