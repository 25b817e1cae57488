"""What a request may say. Fields of OpenAI's that change nothing here are taken and ignored; those that would have to change
the answer, and cannot, are refused unless they are as if not given; any other is refused by name."""

from __future__ import annotations

import secrets
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylmm.config.video import SamplingSpec
from tinylmm.errors import suggestion
from tinylmm.generation.choose import Sampling
from tinylmm.serving.errors import ApiError, wrong

T = TypeVar("T", bound="AnswerFields")

SEEDS = 2**63
MAX_STOPS = 16

_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "parallel_tool_calls",
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none", "minimal"),
    "best_of": (1,),
}
"""Fields that are not supported, with the values that ask for nothing."""


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class VideoFields(BaseModel):
    """Which frames of videos are shown, in vLLM's words."""

    model_config = ConfigDict(strict=True, extra="forbid")
    num_frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0)


class MediaFields(BaseModel):
    """How images and videos are read, as vLLM's requests have it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    video: VideoFields | None = None


class AnswerFields(BaseModel):
    """What all kinds of requests say of their answers; `top_k` and `repetition_penalty` are as other open servers have them."""

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=SEEDS - 1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-SEEDS, le=SEEDS - 1)
    stream: bool | None = None
    media_io_kwargs: MediaFields | None = None

    @property
    def frames(self) -> SamplingSpec | None:
        """Which frames of videos are shown; None leaves it to the model. As in vLLM, a short clip shows each frame once."""
        asked = self.media_io_kwargs.video if self.media_io_kwargs is not None else None
        if asked is None or (asked.num_frames is None and asked.fps is None):
            return None
        if asked.fps is None:
            return SamplingSpec(uniform=asked.num_frames, distinct=True)
        return SamplingSpec(fps=asked.fps, max=asked.num_frames, distinct=True)

    def limit(self, default: int) -> int:
        """Most new tokens."""
        return default

    def sampling(self, default_length: int, choice: int) -> Sampling:
        """How one of several answers is chosen; each has a seed of its own."""
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if getattr(self, name) is not None
        }
        seed = secrets.randbelow(SEEDS) if self.seed is None else (self.seed + choice) % SEEDS
        return Sampling(max_new_tokens=self.limit(default_length), seed=seed, **given)


class ChatRequest(AnswerFields):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    def limit(self, default: int) -> int:
        """Most new tokens; where both are given, the newer name counts."""
        return self.max_completion_tokens or self.max_tokens or default

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens are told with each; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def read_chat(body: bytes, max_choices: int) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: it is no JSON, or a field is unknown or out of range.
    """
    request = read(ChatRequest, body)
    if (request.n or 1) > max_choices:
        raise wrong(f"n is {request.n}; this server gives {max_choices} answers to a request at most.", "n")
    if len(request.stops) > MAX_STOPS or not all(request.stops):
        raise wrong(f"stop must be at most {MAX_STOPS} texts, none of them empty.", "stop")
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs needs logprobs to be true.", "top_logprobs")
    return request


def read(kind: type[T], body: bytes) -> T:
    """Read a request of any kind.

    Raises:
        ApiError: it is no JSON object, or a field is unknown or of a wrong type or range.
    """
    given = _object(body)
    for name in _IGNORED:
        given.pop(name, None)
    for name, allowed in kind.neutral.items():
        value = given.pop(name, None)
        if value is not None and value not in allowed:
            text = "".join(f", or give {one!r}" for one in allowed)
            raise wrong(f"{name} is not supported; leave it out{text}.", name, "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _object(body: bytes) -> dict[str, Any]:
    class Body(BaseModel):
        model_config = ConfigDict(extra="allow")

    try:
        return dict(Body.model_validate_json(body).model_extra or {})
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_context=False, include_input=False)
        raise wrong(f"the body is no JSON object: {first['msg']}.", None, "invalid_json") from None


def _refusal(kind: type[AnswerFields], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]"))
    if first["type"] == "extra_forbidden":
        known = [*kind.model_fields, *kind.neutral]
        hint = suggestion(param, known)
        return wrong(f"there is no parameter '{param[:80]}'. {hint}".strip(), param[:80], "unknown_parameter")
    if first["type"] == "missing":
        return wrong(f"'{param}' is missing.", param, "missing_required_parameter")
    shown = repr(first["input"])[:60]
    return wrong(f"{param} is {shown}: {first['msg']}.", param)
