"""What decides the result of a stage, one typed model a kind, and how a stage is run.

`planning/graph.py` fills them from the run spec; they are JSON where they are hashed and written (`store/stage.py`), and
models again where a stage's body reads them (`stages/job.py`). No torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tinylmm.config.fields import PartName, Precision
from tinylmm.config.identities import (
    ConnectorIdentity,
    PartIdentity,
    Recorded,
    TokenizerIdentity,
    TowerIdentity,
    TowerOutput,
)
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import TuneSpec
from tinylmm.config.spec import ImageSpec, TextTowerSpec, TrackingSpec
from tinylmm.config.trainer import TrainerSpec
from tinylmm.config.video import Baseline, SamplingSpec

Content = dict[str, Any]
"""Identity by content of files outside the store, from `planning/fingerprints.py`; compared, never read."""

# ------------------------------------------------------------------------------------------------ what decides


class SourceIdentity(Recorded):
    """What is read of a source: of a data stage's output by its file, elsewhere by content (`SourceSpec` has the fields)."""

    file: str | None = None
    images: str = ""
    format: str = "llava"
    limit: int | None = None
    on_bad: Literal["fail", "skip"] = "fail"
    max_bad: int = 0
    follow_links: bool = False
    orientation: Literal["ignore", "apply"] = "ignore"
    content: Content | None = None


class DataBuild(Recorded):
    """The function that makes a data set, and its arguments."""

    target: str = Field(alias="_target_")
    seed: int
    options: dict[str, Any]


class DataStage(Recorded):
    """Makes a data set's files."""

    build: DataBuild


class PartBuild(Recorded):
    """How a part is trained from nothing (`PartBuildSpec` has the meanings)."""

    steps: int
    batch: int
    lr: float
    warmup_ratio: float
    weight_decay: float
    max_length: int
    seed: int
    text_tower: TextTowerSpec = TextTowerSpec()


class PartsStage(Recorded):
    """Builds a tokenizer, an LLM or a vision tower from nothing; which fields there are depends on `role`."""

    role: Literal["tokenizer", "llm", "vision_tower"]
    source: SourceIdentity
    vocab_size: int | None = None
    pad_token: str | None = None
    target: str | None = Field(default=None, alias="_target_")
    pretrained: str | None = None
    revision: str | None = None
    init: Literal["built"] | None = None
    architecture: dict[str, Any] | None = None
    encoder: str | None = None
    image: ImageSpec | None = None
    build: PartBuild | None = None
    tokenizer: TokenizerIdentity | None = None


class ImagesStage(Recorded):
    """Checks every image of a source, whoever reads the source later, and the frames of its videos that are shown."""

    source: SourceIdentity
    sampling: SamplingSpec | None = None
    """Of videos; without one, records that have any are refused. In a digest only where the source may have some."""


class PrepareStage(Recorded):
    """Renders a source's records to token ids; `tokenizer` where no stage built it."""

    template: str
    source: SourceIdentity
    tokenizer: TokenizerIdentity | None = None


class ModelContent(Recorded):
    """A model from outside the store, by content."""

    content: Content


class TrainStage(Recorded):
    """One training of a recipe. What it starts from is a parent (`from`), a `model`, or parts.

    Parts that no stage built are named by their identities; those that a stage built are parents.
    """

    connector: ConnectorIdentity | None = None
    tower_output: TowerOutput | None = None
    chat_template: str | None = None
    scale_image_features: bool = False
    llm: PartIdentity | None = None
    tokenizer: TokenizerIdentity | None = None
    vision_tower: TowerIdentity | None = None
    model: ModelContent | None = None
    tune: TuneSpec
    lr: float | dict[PartName, float]
    global_batch: int
    epochs: float
    max_steps: int | None
    max_length: int
    warmup_ratio: float
    schedule: Literal["cosine", "linear", "constant"]
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    max_grad_norm: float
    precision: Precision
    fp8: bool = False
    seed: int
    trainer: TrainerSpec
    """The fields of TrainingArguments that decide what is learnt."""
    mixture: list[float] | None = None
    """Weights of the prepared sources, in the order of the parents `prepared.0`, `prepared.1`; None for a single one."""
    image_mode: str | None = None
    """How images are seen, where the model that the stage starts from sees them otherwise."""
    sampling: SamplingSpec | None = None
    """Of the videos among the samples; the model keeps it for whoever uses it."""


class AskedStage(Recorded):
    """One benchmark asked of one model (`EvalSpec` has the meanings)."""

    benchmark: str
    layout: Literal["llava", "hf"] = "llava"
    options: dict[str, Any] = Field(default_factory=dict)
    variant: str | None = None
    rules: int = 1
    """Which version of the variant's rules scores; in a digest only where they were mended."""
    limit: int | None = None
    limit_seed: int = 0
    blind: bool = False
    max_new_tokens: int
    template: str
    sampling: SamplingSpec | None = None
    """Of videos; in a digest only where it is set, else it is the model's."""
    frames: Baseline | None = None
    """What is shown in place of a clip's frames; in a digest only where it is set."""
    precision: Precision = "fp32"
    source: SourceIdentity | None = None
    content: Content | None = None
    model: ModelContent | None = None
    """Of a model that no stage of this store made; else it is the parent `model`."""


class EvalStage(AskedStage):
    """Asks a benchmark's questions, and scores the answers by rules."""

    judge: None = None
    """Whoever judges the answers has no part in them; that it is said keeps the digests as they were."""


class JudgeStage(AskedStage):
    """Lets a judge score the answers of the parent `answers`."""

    judge: str | None
    """Name of the judging model; None where none is named yet, and the answers wait for one."""
    judge_runs: int = 1


# ------------------------------------------------------------------------------------------------ how it is run


class LocatedSource(Recorded):
    """A source by its paths (`SourceSpec` has the meanings)."""

    annotations: str | None = None
    images: str = ""
    format: str = "llava"
    limit: int | None = None
    on_bad: Literal["fail", "skip"] = "fail"
    max_bad: int = 0
    follow_links: bool = False
    orientation: Literal["ignore", "apply"] = "ignore"
    how_to_get: str = ""

    @property
    def allowed(self) -> int:
        """How many bad records may be left out."""
        return self.max_bad if self.on_bad == "skip" else 0


class Location(Recorded):
    """Where a stage reads: a source below `root`, or below the data stage's output where `root` is None."""

    root: str | None
    source: LocatedSource
    judge_url: str | None = None


class StageSettings(Recorded):
    """How a stage is run. Nothing here decides a result."""

    launch: LaunchSpec = LaunchSpec()
    tracking: TrackingSpec = TrackingSpec()
    trainer: TrainerSpec = TrainerSpec()
    """Every field that is set; those that decide a result stand in the stage's own `trainer` too."""
    trust: tuple[str, ...] = ()
    folders: dict[str, str] = Field(default_factory=dict)
    """Role -> local folder of published weights; `from` is the model that a recipe starts from, `model` one to evaluate."""
    max_dropped: float = 1.0
    """Of a training: the share of its samples that `max_length` may leave nothing of."""
    location: Location | None = None
    locations: tuple[Location, ...] | None = None
    """Of a mixture's sources, in its order."""
