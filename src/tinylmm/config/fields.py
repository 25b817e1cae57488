"""What all spec models are made of: their base, and the kinds of values that several of them use."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_serializer

PartName = Literal["llm", "vision_tower", "connector"]
PARTS: tuple[str, ...] = get_args(PartName)
TemplateName = Literal[
    "phi", "llama", "gemma", "qwen2_base", "qwen2_instruct", "pretrain", "plain", "tiny_llama", "tiny_llama_bench",
    "llava_llama_2", "mpt", "hf_llava", "hf_llava_1_5", "chatml", "gemma_chat", "phi3", "llama3", "native",
]  # fmt: skip
"""Chat templates; their layouts are in `data/chat.py`, which has exactly these."""
ImageMode = Literal["square", "squash", "center_crop", "pad", "anyres"]
"""How an image becomes a tower's input; `ImageSpec` has the meanings."""
Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """Base of every spec model: immutable, no unknown keys, dumps and loads by the YAML's own key names."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Sparse(Frozen):
    """A spec model that dumps the fields that are set, and no others: what is not set has no value of its own here."""

    @model_serializer
    def _what_is_set(self) -> dict[str, Any]:
        return self.given()

    def given(self) -> dict[str, Any]:
        """Return the fields that are set, as plain data."""
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {k: v.model_dump(mode="json") if isinstance(v, Frozen) else v for k, v in fields if v is not None}
