"""What all spec models are made of: their base, and the kinds of values that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PARTS = ("llm", "vision_tower", "connector")
PartName = Literal["llm", "vision_tower", "connector"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """Base of every spec model: immutable, no unknown keys, dumps and loads by the YAML's own key names."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)
