"""The recipe's part of the run spec: stages in order, and how each trains each part."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tinylmm.config.fields import Fraction, Frozen, ImageMode, PartName, Positive, Precision, Sparse, TemplateName
from tinylmm.config.video import SamplingSpec


class LoraSpec(Frozen):
    """Low-rank adapters on linear layers (arXiv 2106.09685), by default with TinyLLaVA Factory's numbers."""

    r: Positive = 128
    alpha: Annotated[float, Field(gt=0)] = 256.0
    """The adapter's output is scaled by alpha / r, or alpha / sqrt(r) with `rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter, by the end of their name (q_proj); all-linear leaves out the LLM's output head."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: all of the part, or those of layers with an adapter."""
    rslora: bool = False


class QLoraSpec(LoraSpec):
    """Adapters on linear layers whose own weights are held in 4 or 8 bits (arXiv 2305.14314)."""

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of 4-bit weights."""
    double_quant: bool = True
    """Of 4-bit weights: hold their scales in 8 bits too."""

    @model_validator(mode="after")
    def _four_bits_for_their_fields(self) -> QLoraSpec:
        if self.bits == 8 and (self.quant_type, self.double_quant) != ("nf4", True):
            raise ValueError(
                "sets quant_type or double_quant, which weights of 8 bits do not have; remove it, or set bits=4"
            )
        return self


class TuneHow(Sparse):
    """How a part is trained, where one word does not say it: exactly one of the keys."""

    from_layer: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | None = None
    """Train the blocks from this one on: an index, or a fraction of the depth (share: 12 of 24, the upper half)."""
    lora: LoraSpec | None = None
    qlora: QLoraSpec | None = None

    @model_validator(mode="after")
    def _one_way(self) -> TuneHow:
        given = [name for name in TuneHow.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"names {' and '.join(given) or 'none'} of from_layer, lora and qlora; it must name one "
                "(set the other to null, where the recipe brings it)"
            )
        return self


Tune = Literal["frozen", "full", "lora", "qlora"] | TuneHow


class TuneSpec(Frozen):
    """What of each part is trained."""

    llm: Tune = "frozen"
    vision_tower: Tune = "frozen"
    connector: Tune = "full"

    @field_validator("llm", "vision_tower", "connector", mode="after")
    @classmethod
    def _adapters_in_numbers(cls, tune: Tune) -> Tune:
        """`lora` means its default numbers: written out, so that a spec says what was done, and both are one stage."""
        written_out = {"lora": TuneHow(lora=LoraSpec()), "qlora": TuneHow(qlora=QLoraSpec())}
        return written_out.get(tune, tune) if isinstance(tune, str) else tune


class RecipeStage(Frozen):
    """One training stage. Its optimiser steps are defined by samples, so batch layout and world size do not change them."""

    start: str = Field(alias="from")
    """`parts`, `model` (the recipe's `from_model`), or the name of an earlier stage whose model is trained on."""
    data: str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Key of `data.sources`, or a mixture `{key: weight}`: how often an epoch has each sample of the source (1 once, 2 twice,
    0.5 every other one, the others in the next epoch)."""
    tune: TuneSpec
    lr: Annotated[float, Field(gt=0)] | dict[PartName, Annotated[float, Field(gt=0)]]
    """Peak learning rate: one for all, or one a part."""
    global_batch: Positive
    """Samples an optimiser step, over all ranks and accumulation."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    """Stop after so many optimiser steps whatever `epochs` says."""
    max_length: Positive
    """Tokens a sample may have, image tokens counted in; a longer one is cut and counted."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the samples that may be left out because `max_length` leaves them nothing to learn. With more the stage stops
    before it trains. It decides no result, so it is in no digest."""
    warmup_ratio: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = "bf16"
    fp8: bool = False
    """Not exact: multiply by the frozen LLM's linear layers (not its head) in eight-bit floats, in a stage in bf16."""
    template: Literal["auto"] | TemplateName
    """Chat template; `auto` is the LLM's own."""
    image_mode: Literal["auto"] | ImageMode = "auto"
    """How this stage sees images, and so whoever uses its model (`vision_tower.image.mode` has the meanings); `auto` is the
    tower's own."""

    @model_validator(mode="after")
    def _eight_bits_of_what_is_frozen(self) -> RecipeStage:
        if self.fp8 and (self.tune.llm != "frozen" or self.precision != "bf16"):
            raise ValueError(
                "sets fp8, which holds the linear layers of a frozen LLM in eight bits; set tune.llm=frozen and "
                "precision=bf16, or fp8=false"
            )
        return self

    @property
    def mixture(self) -> dict[str, float]:
        """Source -> weight, also where `data` names one source."""
        return {self.data: 1.0} if isinstance(self.data, str) else dict(self.data)


class StageScale(Sparse):
    """What one LLM needs in a recipe's stage in place of the published numbers; see `RecipeStage`."""

    lr: Annotated[float, Field(gt=0)] | None = None
    global_batch: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_length: Positive | None = None
    warmup_ratio: Fraction | None = None
    precision: Precision | None = None


class ShareScale(StageScale):
    """Of the share recipe's second pretraining."""

    from_layer: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | None = None
    """First block of the tower that is trained."""


class FullScale(Sparse):
    """Of a finetuning that trains all three parts."""

    tower_lr: Annotated[float, Field(gt=0)] | None = None


class LoraScale(Sparse):
    """Of adapters; see `LoraSpec`."""

    r: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None


class ScaleSpec(Sparse):
    """Hyperparameters that an LLM needs in place of the published ones, by role; recipes read them through `oc.select`."""

    alignment: StageScale | None = None
    """The first pretraining, which aligns the connector."""
    share: ShareScale | None = None
    tuning: StageScale | None = None
    """The finetuning."""
    full: FullScale | None = None
    lora: LoraScale | None = None


class RecipeSpec(Frozen):
    """A training recipe: named stages in the order in which they run."""

    name: str
    published_data: str
    """The data set that the recipe was published with; `data=auto` means it."""
    published_eval: str = "none"
    """The benchmarks that its paper reports, a choice of `eval`; `eval=auto` means those whose files are there."""
    sampling: SamplingSpec | None = None
    """The frames of a clip that the recipe was published with; `video.sampling` is them unless it says otherwise."""
    from_model: str | None = None
    """A model to start from: its folder, a training stage's, or the name of a run. LLM, tower and connector are then its."""
    stages: dict[str, RecipeStage]
    """None where a model is only evaluated."""

    @model_validator(mode="after")
    def _stages_start_from_earlier_ones(self) -> RecipeSpec:
        if not self.stages:
            if self.from_model is None:
                raise ValueError("trains nothing, so set recipe.from_model to a model's folder or the name of a run")
            return self
        starts = {stage.start for stage in self.stages.values()}
        if self.from_model is None and "model" in starts:
            raise ValueError("starts from a model, so set recipe.from_model to a model's folder or the name of a run")
        seen = ["parts" if self.from_model is None else "model"]
        if self.from_model is not None and "model" not in starts:
            raise ValueError(
                "has from_model, but no stage starts from it; use recipe=custom_finetune or set from: model"
            )
        if {"parts", "model"} & self.stages.keys():
            raise ValueError("a stage may not be called parts or model: `from` means something else by these words")
        for name, stage in self.stages.items():
            if stage.start not in seen:
                raise ValueError(f"stage '{name}' starts from '{stage.start}', which is none of the earlier {seen}")
            seen.append(name)
        return self
