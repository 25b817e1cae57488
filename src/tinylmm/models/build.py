"""Build an LMM from the identities of its parts: published weights, random ones, or a finished part-building stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tinylmm.config.identities import ConnectorIdentity, PartIdentity, TokenizerIdentity, TowerIdentity, TowerOutput
from tinylmm.config.targets import resolve_target
from tinylmm.config.weight_files import check_weights
from tinylmm.errors import ConfigError, Fault, UserError
from tinylmm.models.anyres import with_tiles
from tinylmm.models.attention import loading_attention
from tinylmm.models.connectors import Connector
from tinylmm.models.encoders import HubEncoder, refuse_other_normalisation
from tinylmm.models.llm import load_llm, random_llm
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower, make_tower

Identity = TypeVar("Identity", PartIdentity, TowerIdentity)


@dataclass(frozen=True)
class PartSource(Generic[Identity]):
    """A part and where its weights come from.

    Attributes:
        identity: what it is.
        built: output folder of the stage that built it; None for a published or random part.
        local: folder of published weights, where they do not come from the hub.
    """

    identity: Identity
    built: Path | None = None
    local: str | None = None

    @property
    def where(self) -> str:
        """Folder or hub id of published weights."""
        return self.local or str(self.identity.pretrained)


def part_source(
    kind: type[Identity], identity: Identity | None, built: Path | None, local: str | None
) -> PartSource[Identity]:
    """Return a part's source: what a stage built has its identity beside its weights, any other one in the spec."""
    if built is not None:
        return PartSource(kind.of_folder(built), built)
    assert identity is not None, "a part that no stage built has an identity"
    return PartSource(identity, None, local)


def build_lmm(
    llm_source: PartSource[PartIdentity],
    tower_source: PartSource[TowerIdentity],
    connector_identity: ConnectorIdentity,
    tower_output: TowerOutput,
    template: str,
    seed: int,
    trust: Sequence[str],
    attention: str = "auto",
    scale_image_features: bool = False,
    llm_weights: bool = True,
) -> LMM:
    """Put an LMM together for the first training stage.

    Args:
        tower_output: how the tower's output is read.
        template: chat template's name.
        seed: draws the connector (and parts with init=random).
        trust: packages besides ours whose classes may be built.
        attention: launch.attention; flash-attn, which cannot compute in fp32 on the CPU, is left to `LMM.set_attention`.
        scale_image_features: see `LMM`.
        llm_weights: without them the parameters of an LLM that is loaded are on the meta device.

    Raises:
        UserError: weights are not to be had, or the widths do not fit the connector.
    """
    torch.manual_seed(seed)
    llm = _load_llm(llm_source, trust, attention, llm_weights)
    encoder = _load_encoder(tower_source, trust, loading_attention(attention))
    tower_class = resolve_target(tower_source.identity.target, trust, nn.Module, role="vision_tower")
    image = tower_source.identity.image
    tower = make_tower(tower_class, encoder, tower_output, image)
    # Drawn after the parts, from the seed alone: whether a part is random or loaded does not move the connector.
    torch.manual_seed(seed)
    connector = build_connector(connector_identity, tower.hidden_size, llm, trust)
    check_fit(tower, connector)
    connector = with_tiles(connector, image, tower.num_tokens)
    return LMM(llm, tower, connector, template, scale_image_features)


def build_connector(identity: ConnectorIdentity, vision_dim: int, llm: nn.Module, trust: Sequence[str]) -> Connector:
    """Build a connector between a tower of width `vision_dim` and the LLM's input embeddings."""
    llm_dim = llm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    connector_class = resolve_target(identity.target, trust, Connector, role="connector")
    try:
        return cast(Connector, connector_class(vision_dim, llm_dim, **identity.options))
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


def load_tokenizer(
    identity: TokenizerIdentity | None, built: Path | None = None, local: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer; it always has a padding token afterwards.

    Args:
        identity: of a published tokenizer.
        built: output folder of the stage that built it, which then needs no identity.
        local: folder of a published one, where it does not come from the hub.

    Raises:
        UserError: it cannot be loaded, or has no padding token.
    """
    where: str | Path | None = built
    revision, pad_token = None, None
    if built is None:
        assert identity is not None, "a tokenizer that no stage built has an identity"
        where = local or identity.pretrained
        revision, pad_token = identity.revision, identity.pad_token
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


def _load_llm(source: PartSource[PartIdentity], trust: Sequence[str], attention: str, weights: bool) -> PreTrainedModel:
    identity = source.identity
    target = cast(type[PreTrainedModel], resolve_target(identity.target, trust, PreTrainedModel, role="llm"))
    if source.built is not None:
        return load_llm(target, source.built, None, attention, local_only=True, weights=weights)
    if identity.init == "random":
        return random_llm(target, identity.architecture, attention)
    _check_local(source.where)
    try:
        return load_llm(target, source.where, identity.revision, attention, identity.architecture, weights=weights)
    except OSError as error:
        raise _unavailable("llm", source.where, error) from error


def _load_encoder(source: PartSource[TowerIdentity], trust: Sequence[str], implementation: str) -> PreTrainedModel:
    identity = source.identity
    found = resolve_target(identity.encoder, trust, PreTrainedModel, role="encoder")
    model_class = cast(type[PreTrainedModel], found)
    options: dict[str, Any] = {"attn_implementation": implementation, "dtype": torch.float32}
    if source.built is not None:
        return model_class.from_pretrained(source.built, local_files_only=True, **options)
    if identity.init == "random":
        if model_class.config_class is None:
            what = f"is random, but {model_class.__name__} stands for whatever class the checkpoint names."
            fix = "Choose a vision_tower whose YAML has an architecture."
            raise ConfigError([Fault("vision_tower.init", what, fix)])
        config = model_class.config_class(**identity.architecture)
        return cast(PreTrainedModel, model_class._from_config(config, **options))
    _check_local(source.where)
    try:
        if model_class is HubEncoder:
            refuse_other_normalisation(source.where, identity.revision, identity.image)
        return model_class.from_pretrained(source.where, revision=identity.revision, **options)
    except OSError as error:
        raise _unavailable("vision_tower", source.where, error) from error
    except ValueError as error:
        raise ConfigError([Fault("vision_tower.pretrained", str(error))]) from error


def _check_local(where: str) -> None:
    for name in where.split("+"):
        if Path(name).is_dir():
            check_weights(Path(name))


def _unavailable(role: str, where: str, error: OSError) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"{role}: the weights of '{where}' cannot be loaded ({reason}). "
        f"Download them with `hf download {where}` on a machine with network, or give a local folder as {role}.pretrained, "
        f"or start from random weights with {role}.init=random."
    )
