"""The run spec: everything a run needs to know, frozen and validated, with no torch behind it.

Every model forbids unknown keys. `config/compose.py` builds a `RunSpec` from Hydra's output and turns pydantic's findings
into one message that lists every fault. Which of these fields decide a result is said in `planning/graph.py`, not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tinylmm.config.fields import Fraction, Frozen, ImageMode, Positive, Precision, Sparse, TemplateName
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import RecipeSpec, ScaleSpec
from tinylmm.config.trainer import TrainerSpec
from tinylmm.config.video import Baseline, SamplingSpec, VideoSpec

# ---------------------------------------------------------------------------------------------------- data


def _check_skip(on_bad: str, max_bad: int, what: str) -> None:
    if on_bad == "fail" and max_bad:
        raise ValueError("has a `max_bad`, which allows nothing while on_bad=fail; set on_bad=skip too")
    if on_bad == "skip" and max_bad == 0:
        raise ValueError(
            f"on_bad=skip needs max_bad, the number of {what} that may be left out; set max_bad to 1 or more"
        )


class SourceSpec(Frozen):
    """One annotation file with the folder its images lie in, both relative to the data set's root."""

    annotations: str
    images: str = ""
    format: Literal["llava", "openai", "sharegpt", "parquet", "auto", "questions"] = "llava"
    """Layout of its records (`data/formats.py`); `auto` looks at each. `questions` are for evaluation, not for training."""
    limit: Positive | None = None
    """Use only the first so many records."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What a broken record or image does: stop before training with the full list, or be left out and counted."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """With `on_bad: skip`, how many may be left out before the run stops all the same."""
    follow_links: bool = False
    """Read images behind links that lead out of the image folder, to another disk."""
    orientation: Literal["ignore", "apply"] = "ignore"
    """`apply` turns images as their camera says (EXIF); published recipes ignore it, since their code does."""
    how_to_get: str = ""
    """Shown when a file is missing."""

    @model_validator(mode="after")
    def _skip_and_its_limit(self) -> SourceSpec:
        _check_skip(self.on_bad, self.max_bad, "records")
        return self


class DataBuildSpec(Frozen):
    """A data set that a `data` stage makes (the embedded digits scenes)."""

    target: str = Field(alias="_target_")
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict)


class DataSpec(Frozen):
    """A named data set: files under `root`, or files that a `data` stage builds."""

    name: str
    root: str | None = None
    build: DataBuildSpec | None = None
    sources: dict[str, SourceSpec]

    @model_validator(mode="after")
    def _root_or_build(self) -> DataSpec:
        if (self.root is None) == (self.build is None):
            raise ValueError(
                "a data set needs either `root` (a folder with the files) or `build` (a stage that makes them)"
            )
        return self


# ---------------------------------------------------------------------------------------------------- parts


class TextTowerSpec(Sparse):
    """Size of a text encoder; see `models/pretraining.py` for what it is where nothing is set."""

    width: Positive | None = None
    layers: Positive | None = None
    heads: Positive | None = None


class PartBuildSpec(Frozen):
    """How a `parts` stage trains a part from nothing: on which data, for how long."""

    data: DataSpec
    source: str
    steps: Positive
    batch: Positive
    lr: Annotated[float, Field(gt=0)]
    warmup_ratio: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_length: Positive = 128
    seed: int = 0
    text_tower: TextTowerSpec = TextTowerSpec()
    """Contrastive pretraining only: the text encoder that is thrown away afterwards."""


class TokenizerSpec(Frozen):
    """A published tokenizer, or one trained by a `parts` stage on a data source's text."""

    pretrained: str | None = None
    revision: str | None = None
    pad_token: str | None = None
    """Used where the tokenizer has no padding token of its own."""
    vocab_size: Positive | None = None
    """Set when the tokenizer is trained in the process: size of its byte-level BPE vocabulary."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerSpec:
        if (self.pretrained is None) == (self.vocab_size is None):
            raise ValueError("a tokenizer needs either `pretrained` or `vocab_size` (trained in the process)")
        return self


class PretrainedPart(Frozen):
    """What an LLM and a vision tower have in common: a class, a published checkpoint, an architecture."""

    target: str = Field(alias="_target_")
    name: str
    pretrained: str | None = None
    """Hub id or local folder."""
    revision: str | None = None
    """Commit of the hub repository, so that the same spec always means the same weights."""
    init: Literal["pretrained", "random", "built"] = "pretrained"
    architecture: dict[str, Any]
    """Fields of the Hugging Face config class: planning and random initialisation need no network."""
    build: PartBuildSpec | None = None

    @model_validator(mode="after")
    def _origin_is_complete(self) -> PretrainedPart:
        if self.init == "pretrained" and self.pretrained is None:
            raise ValueError("init=pretrained needs `pretrained`, a hub id or a local folder; or set init=random")
        if self.init == "built" and self.build is None:
            raise ValueError("init=built needs `build`; or set init=random")
        return self


class LLMSpec(PretrainedPart):
    """A causal language model of transformers, or of tinylmm where transformers has none."""

    tokenizer: TokenizerSpec
    template: TemplateName
    """Chat template of finetuning and evaluation (`data/chat.py`)."""
    scale_image_features: bool = False
    """Multiply image features by the square root of the LLM's width, as Gemma multiplies its own embeddings."""
    scale: ScaleSpec = ScaleSpec()


class ImageSpec(Frozen):
    """How an image becomes a tower's input (H = W = `size` pixels)."""

    size: Positive
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    square: Literal["squash", "center_crop"] = "squash"
    """What `mode: square` means for this tower."""
    mode: ImageMode
    """`squash` resizes to size x size, `center_crop` resizes the short edge and cuts the rest, `pad` squares with the mean
    colour first; `square` is what the tower's own processor does, as in TinyLLaVA Factory's `image_aspect_ratio`; `anyres`
    cuts it into tiles of `size`, as LLaVA-1.6 does."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    short_edge: Positive | None = None
    """To what `center_crop` resizes the short edge; by default to `size`, so that nothing of it is cut."""
    tiles: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)] = (
        (1, 2),
        (2, 1),
        (2, 2),
        (3, 1),
        (1, 3),
    )
    """Canvases of `anyres` as rows and columns of tiles; by default LLaVA-1.6's."""

    @field_validator("mode")
    @classmethod
    def _square_is_another_name(cls, mode: str, found: ValidationInfo) -> str:
        """Resolve `square`: a run that asks for it is the same run as one that names the mode itself."""
        return str(found.data.get("square", "squash")) if mode == "square" else mode

    def in_mode(self, mode: str) -> ImageSpec:
        """Return the same preprocessing in another mode; `auto` is its own."""
        return (
            self if mode == "auto" else ImageSpec.model_validate(self.model_dump(exclude_unset=True) | {"mode": mode})
        )

    @model_validator(mode="after")
    def _crop_lies_inside(self) -> ImageSpec:
        if self.short_edge is not None and self.short_edge < self.size:
            raise ValueError(
                f"short_edge is {self.short_edge}, less than the size of {self.size} that is cut out of it"
            )
        return self


class TowerSpec(PretrainedPart):
    """A vision tower: which encoder, which layer's output, which of its tokens."""

    encoder: str
    """Dotted path of the transformers class that holds the weights."""
    image: ImageSpec
    select_layer: int = -2
    """Index into hidden states (0 is the embedding), as in LLaVA; the blocks behind it are not run."""
    select: Literal["patch", "all"] = "patch"
    """`patch` drops the CLS and register tokens where the encoder has them; `all` keeps them."""
    drop_first_token: bool = False
    """Drop the first patch too, as published TinyLLaVA Factory checkpoints with SigLIP do (728 tokens, not 729)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the tower's class."""


class ConnectorSpec(Frozen):
    """Maps tower features (B, P, Dv) to LLM inputs (B, Q, Dl); both widths come from the built parts."""

    target: str = Field(alias="_target_")
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class besides the two widths."""


# ---------------------------------------------------------------------------------------------------- eval, launch, tracking


class JudgeSpec(Frozen):
    """The model that scores open answers, behind an OpenAI-compatible endpoint; its key comes from the environment only."""

    base_url: str | None = None
    """With the version: `https://api.openai.com/v1`. Without one, the answers of a judged benchmark wait."""
    model: str | None = None
    runs: Positive = 1
    """How often every answer is judged, where a benchmark averages over that (MM-Vet; its paper takes 5)."""

    @model_validator(mode="after")
    def _url_and_model(self) -> JudgeSpec:
        if (self.base_url is None) != (self.model is None):
            raise ValueError("a judge needs both `base_url` and `model`")
        return self


class EvalSpec(Frozen):
    """One benchmark, after the last stage or after every one.

    Its files lie under `root` (a published benchmark), or are a source of a data set (`data` and `source`).
    """

    benchmark: str
    """A shipped one (a module of `evaluation/benchmarks`), or the dotted path of a class in a package that `trust` names."""
    root: str | None = None
    layout: Literal["llava", "hf"] = "llava"
    """Question files of LLaVA's eval.zip beside the official annotations, or Hugging Face parquet files."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the benchmark's class: which `split`, TextVQA's `ocr`."""
    data: DataSpec | None = None
    source: str | None = None
    variant: str | None = None
    """Scoring protocol; by default the benchmark's first, which reproduces the papers."""
    judge: JudgeSpec = JudgeSpec()
    limit: Positive | None = None
    """Ask at most so many questions, drawn from every category; questions that are scored together stay together."""
    limit_seed: Annotated[int, Field(ge=0)] = 0
    """Which draw it is."""
    optional: bool = False
    """Leave the benchmark out where its files are not found, and say so; so `eval=auto` chooses."""
    after: Literal["last", "every"] = "last"
    blind: bool = False
    """Ask every question without its image too: what the language model alone would score."""
    frames: Baseline | None = None
    """In place of a clip's frames: `middle` shows the middle one alone, `shuffled` shows them in an order of chance."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What an image or a video that cannot be read does: stop the evaluation, or have the questions about it counted, and
    scored as questions without an answer."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """With `on_bad: skip`, how many images and videos may be unreadable before the evaluation stops all the same."""
    max_new_tokens: Positive
    template: Literal["auto"] | TemplateName = "auto"
    sampling: SamplingSpec | None = None
    """The frames of videos that are shown; by default those that the model was trained with."""
    precision: Literal["auto", Precision] = "auto"
    """Of the weights. `auto` is bf16 where the launch means GPUs (`LaunchSpec.on_gpu`), else fp32, and becomes that word when a
    run is composed: answers of either are another result. bf16 and fp16 take half the memory. In fp32 answers are the same
    in any batch; so are bf16's and fp16's on a GPU, though not fp32's, where the scores' `batch_independent` says it."""

    @model_validator(mode="after")
    def _root_or_source(self) -> EvalSpec:
        if (self.root is None) == (self.data is None) or (self.data is None) != (self.source is None):
            raise ValueError(
                "a benchmark needs either `root` (the folder its files lie in) or both `data` and `source`"
            )
        if self.data is not None and self.layout != "llava":
            raise ValueError("has a `layout`, which is of the files below `root`; a source of `data` has a `format`")
        if self.limit is None and self.limit_seed:
            raise ValueError("has a `limit_seed`, which draws nothing without a `limit`; set `limit` too")
        _check_skip(self.on_bad, self.max_bad, "images and videos")
        return self

    @property
    def allowed(self) -> int:
        """How many images and videos may be unreadable."""
        return self.max_bad if self.on_bad == "skip" else 0


class WandbSpec(Frozen):
    """Weights & Biases; off unless asked. The key comes from the environment, never from here; without one it runs offline."""

    enabled: bool = False
    project: str = "tinylmm"
    entity: str | None = None


class TrackingSpec(Frozen):
    """Where training curves go besides the stage's own metrics.jsonl."""

    tensorboard: bool = True
    wandb: WandbSpec = WandbSpec()
    log_steps: Positive = 10


class RunSpec(Frozen):
    """One run, whole."""

    name: str | None = None
    """Folder name under store/runs; by default made of the chosen parts and recipe."""
    seed: int = 0
    store: Path = Path("store")
    llm: LLMSpec
    vision_tower: TowerSpec
    connector: ConnectorSpec
    recipe: RecipeSpec
    data: DataSpec
    video: VideoSpec = VideoSpec()
    eval: dict[str, EvalSpec] = Field(default_factory=dict)
    launch: LaunchSpec = LaunchSpec()
    tracking: TrackingSpec = TrackingSpec()
    trainer: TrainerSpec = TrainerSpec()
    trust: tuple[str, ...] = ()
    """Packages besides tinylmm, torch and transformers that `_target_` may name."""

    def image_of(self, stage: str) -> ImageSpec:
        """How a stage of the recipe sees images."""
        return self.vision_tower.image.in_mode(self.recipe.stages[stage].image_mode)
