"""Which frames of a clip a model is shown, as a spec says it: `video.sampling: {uniform: 16}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinylmm.config.fields import Frozen, Positive, Sparse

Baseline = Literal["middle", "shuffled"]
"""What an evaluation shows of a clip to see what time is worth: its middle frame alone, or its frames in an order of chance."""
SAMPLERS = ("uniform", "fps", "segments", "left_edge")


class SamplingSpec(Sparse):
    """Exactly one of `uniform`, `fps`, `segments` and `left_edge`; `data/frame_sampling.py` has what each means."""

    uniform: Positive | None = None
    """So many frames, evenly spread from the first to the last."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """So many frames a second of the clip, at least one, evenly spread from the first to the last."""
    segments: Positive | None = None
    """So many frames, each near the middle of one of as many equal parts of the clip."""
    left_edge: Positive | None = None
    """A frame a second, at most so many, each at the left edge of its part of the clip."""
    max: Positive | None = None
    """With `fps`: at most so many frames."""
    middle: Annotated[bool, Field(strict=True)] | None = None
    """With `fps`: place the frames as `segments` does."""
    distinct: Annotated[bool, Field(strict=True)] | None = None
    """With `uniform` and `fps`: a clip shorter than the frames wanted gives each of its frames once, not some of them twice."""

    @model_validator(mode="after")
    def _one_sampler(self) -> SamplingSpec:
        chosen = [name for name in SAMPLERS if getattr(self, name) is not None]
        if len(chosen) != 1:
            found = f"has {' and '.join(chosen)}" if chosen else "names none"
            others = (
                "; set the other to null, where an experiment or an earlier word brings it" if len(chosen) > 1 else ""
            )
            raise ValueError(f"a sampling needs exactly one of {', '.join(SAMPLERS)}, but this {found}{others}")
        if self.max is not None and self.fps is None:
            raise ValueError(f"`max` limits fps; {chosen[0]} is a number of frames itself. Leave `max` out")
        if self.distinct is not None and chosen[0] in ("segments", "left_edge"):
            raise ValueError(f"`distinct` is for uniform and fps; leave it out with {chosen[0]}")
        if self.middle is not None and (self.fps is None or self.distinct is not None):
            raise ValueError("`middle` is for fps, without `distinct`; leave one of them out")
        return self

    @property
    def in_words(self) -> str:
        """For reports: `uniform 16`, `fps 1, max 64`."""
        return ", ".join(
            name if value is True else f"{name} {value:g}" for name, value in self.given().items() if value
        )

    @property
    def most(self) -> int | None:
        """Frames that the longest clip is shown with; None where no number is the limit (`fps` without `max`)."""
        return self.max if self.fps is not None else self.uniform or self.segments or self.left_edge


class VideoSpec(Frozen):
    """How a run's models see videos."""

    sampling: SamplingSpec | None = None
    """Which frames of a clip are shown. Without one, training refuses records with videos."""
