"""How many tokens an image or a clip takes in a model that is not built yet: asked of its classes, without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tinylmm.config.hub import read_config
from tinylmm.config.identities import TowerOutput
from tinylmm.config.spec import ConnectorSpec, ImageSpec, TowerSpec
from tinylmm.config.targets import resolve_target
from tinylmm.errors import ConfigError, Fault
from tinylmm.models.anyres import TiledConnector, clip_tokens, with_tiles
from tinylmm.models.build import check_fit
from tinylmm.models.connectors import Connector
from tinylmm.models.encoders import KINDS, HubEncoder
from tinylmm.models.vision import make_tower


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of images and clips.

    Attributes:
        connector: of the model; its weights are not needed.
        tower_tokens: P.
    """

    connector: Connector
    tower_tokens: int

    def __call__(self, width: int, height: int, frames: int = 0) -> int:
        """Tokens of an image of this size in pixels, or of a clip of so many frames of whatever size."""
        if frames:
            return clip_tokens(self.connector, self.tower_tokens, frames)
        if isinstance(self.connector, TiledConnector):
            return self.connector.tokens_of(width, height)
        return self.connector.num_tokens(self.tower_tokens)


def tokens_by_size(
    tower: TowerSpec, connector: ConnectorSpec, image: ImageSpec, trust: Sequence[str]
) -> TokenCounts | None:
    """Return what gives the tokens of images and clips, in a model that sees images as `image` says.

    None where nothing on this machine says what the tower looks like: of `vt=hf` before it is downloaded.

    Raises:
        ConfigError: the parts do not fit each other, as when they are built.
    """
    encoder_class = cast(type[PreTrainedModel], resolve_target(tower.encoder, trust, PreTrainedModel, role="encoder"))
    found = _encoder(encoder_class, tower)
    if found is None:
        return None
    tower_class = resolve_target(tower.target, trust, nn.Module, role="vision_tower")
    connector_class = resolve_target(connector.target, trust, Connector, role="connector")
    read = {name: getattr(tower, name) for name in TowerOutput.model_fields}
    with torch.device("meta"):
        seen = make_tower(tower_class, found[0](found[1]), TowerOutput(**read), image)
        try:  # how wide the LLM is decides no number of tokens
            joined = cast(Connector, connector_class(seen.hidden_size, seen.hidden_size, **connector.options))
        except (TypeError, ValueError) as error:
            raise ConfigError([Fault("connector", str(error))]) from error
        check_fit(seen, joined)
        joined = with_tiles(joined, image, seen.num_tokens)
    return TokenCounts(joined, seen.num_tokens)


def _encoder(named: type[PreTrainedModel], tower: TowerSpec) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The encoder's class and config: the checkpoint's own where a copy is on this machine, else what the spec says."""
    fields = None
    if tower.init == "pretrained" and tower.pretrained is not None:
        fields = read_config(tower.pretrained, tower.revision)
    if named is HubEncoder:
        if fields is None or fields.get("model_type") not in KINDS:
            return None
        named = getattr(transformers, KINDS[fields["model_type"]])
    kind: Any = named.config_class
    if fields is None:
        return named, kind(**tower.architecture)
    return named, kind.from_pretrained(tower.pretrained, revision=tower.revision, local_files_only=True)
