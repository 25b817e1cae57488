"""What of a part decides a result, as it stands in stage specs, `part.json` and a model's config.json. No torch.

The run spec says more about a part (its name, its numbers for recipes); the identity is what tells its weights from others.
Models are written with the fields that were given and no others, so that a field added later changes no older digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from tinylmm.config.fields import Frozen
from tinylmm.config.spec import ImageSpec

PART_FILE = "part.json"
"""Identity of a part beside its Hugging Face files, written by the stages that build parts."""


class Recorded(Frozen):
    """A model that reads back from JSON what it was written from: fields that were not given stay out."""

    def as_json(self) -> dict[str, Any]:
        """The given fields as plain JSON, by the YAML's own key names."""
        return self.model_dump(mode="json", exclude_unset=True)


class PartIdentity(Recorded):
    """Of an LLM, and what a vision tower has in common with one."""

    target: str = Field(alias="_target_")
    pretrained: str | None = None
    """Hub id; `LOCAL_FOLDER` where the weights come from a folder, which `content` then identifies."""
    revision: str | None = None
    init: Literal["pretrained", "random", "built"]
    architecture: dict[str, Any]
    content: dict[str, Any] | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Read the identity that a part-building stage left beside its weights."""
        return cls.of_record(json.loads((folder / PART_FILE).read_text(encoding="utf-8")))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the identity in a record that says more about the part."""
        names = {field.alias or name for name, field in cls.model_fields.items()}
        return cls.model_validate({key: value for key, value in record.items() if key in names})


class TowerIdentity(PartIdentity):
    """Of a vision tower."""

    encoder: str
    image: ImageSpec


class TokenizerIdentity(Recorded):
    """Of a published tokenizer."""

    pretrained: str | None = None
    revision: str | None = None
    pad_token: str | None = None
    vocab_size: int | None = None
    content: dict[str, Any] | None = None


class TowerOutput(Recorded):
    """How a tower's output is read: decides training, not the tower's own weights. See `TowerSpec`."""

    select_layer: int = -2
    select: Literal["patch", "all"] = "patch"
    drop_first_token: bool = False
    options: dict[str, Any] = Field(default_factory=dict)


class ConnectorIdentity(Recorded):
    """Of a connector, whose widths come from the parts beside it."""

    target: str = Field(alias="_target_")
    options: dict[str, Any] = Field(default_factory=dict)
