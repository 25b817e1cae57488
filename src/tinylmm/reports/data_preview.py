"""A run's data as files, and any sample as the model will see it: for looking at data without running a stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from torch import Tensor

from tinylmm.config.recipe import RecipeStage
from tinylmm.config.spec import DataSpec, EvalSpec, RunSpec
from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.data.chat import ChatTemplate, get_template
from tinylmm.data.check import Renderer, SourceFiles, TokensBySize
from tinylmm.data.image_names import video_path
from tinylmm.data.images import open_image, safe_path
from tinylmm.data.sample import BadRecord, Sample, read_samples
from tinylmm.data.transform import ImageTransform
from tinylmm.data.video import find_video, sample_frames
from tinylmm.errors import ConfigError, DataError, Fault, UserError, suggestion
from tinylmm.models.build import load_tokenizer
from tinylmm.models.token_counts import tokens_by_size
from tinylmm.planning.fingerprints import checkpoint_fingerprint
from tinylmm.planning.graph import StageGraph, build_graph
from tinylmm.planning.specs import Content, PrepareStage, StageSettings
from tinylmm.store.layout import StoreLayout
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store


@dataclass(frozen=True)
class Token:
    """One position of a sample: its text, whether it is trained on, and which image it stands for (from 0), if any."""

    text: str
    supervised: bool
    image: int | None = None


@dataclass(frozen=True)
class SeenImage:
    """An image as it is and as the vision tower gets it: one tile, or several where it is cut up; of a video its frames."""

    name: str
    size: tuple[int, int]
    tiles: tuple[Image.Image, ...]
    video: bool = False


@dataclass(frozen=True)
class SeenSample:
    """A sample as the model will see it."""

    files: SourceFiles
    index: int
    sample: Sample
    stage: str
    template: str
    max_length: int
    tokens: tuple[Token, ...]
    images: tuple[SeenImage, ...]

    @property
    def supervised(self) -> int:
        """Tokens that are trained on."""
        return sum(token.supervised for token in self.tokens)


class RunData:
    """The sources of a run's data set, wherever they lie.

    Args:
        run: a checked spec; nothing of it is run.
    """

    def __init__(self, run: RunSpec) -> None:
        self.run = run
        self._store = Store(run.store)

    def files(self, names: Sequence[str] = ()) -> list[SourceFiles]:
        """Return the named sources, or all that the recipe's stages train on.

        Raises:
            ConfigError: a source is not there, or holds questions.
            UserError: the data set is made by the run itself, and not made yet.
        """
        sources = self.run.data.sources
        trained = [source for stage in self.run.recipe.stages.values() for source in stage.mixture]
        faults = []
        for name in names:
            if name not in sources:
                fix = f"{suggestion(name, sources)} Sources: {', '.join(sources)}.".strip()
                faults.append(Fault("--source", f"is '{name}', which data={self.run.data.name} does not have.", fix))
            elif sources[name].format == "questions":
                faults.append(Fault("--source", f"is '{name}', which holds questions for evaluation."))
        if faults:
            raise ConfigError(faults)
        root = self._root()
        return [
            SourceFiles(
                name,
                root / source.annotations,
                root / source.images,
                source.format,
                source.limit,
                source.follow_links,
                source.orientation == "apply",
                self.run.video.sampling,
            )
            for name in dict.fromkeys(names or trained)
            for source in [sources[name]]
        ]

    def stage_of(self, source: str) -> str:
        """The last stage that trains on a source, or the last of all: its template is what samples are shown in."""
        stages = self.run.recipe.stages
        return next((name for name in reversed(stages) if source in stages[name].mixture), list(stages)[-1])

    def renderer(self, stage_name: str) -> tuple[ChatTemplate, Renderer, _Decoder]:
        """Return what a stage makes of a sample.

        Raises:
            UserError: the tokenizer is not to be had, or does not fit the stage's template.
        """
        graph = build_graph(self.run, _Checkpoints(StoreLayout(self.run.store).fingerprints))
        prepare = next(stage for stage in graph if stage.kind == "prepare" and _is_of(stage, stage_name))
        parents = {role: self._output(graph, digest) for role, digest in prepare.parents.items() if role == "tokenizer"}
        spec = PrepareStage.model_validate(prepare.spec)
        folders = StageSettings.model_validate(prepare.settings).folders
        tokenizer = load_tokenizer(spec.tokenizer, parents.get("tokenizer"), folders.get("tokenizer"))
        template = get_template(spec.template)
        template.fitted(tokenizer)
        return template, lambda sample: template.render(sample.turns, tokenizer, sample.system), _Decoder(tokenizer)

    def image_tokens(self, stage_name: str) -> TokensBySize | None:
        """Return what an image takes in the model that a stage trains; None where no file here says what its tower is.

        Raises:
            ConfigError: the parts do not fit each other.
        """
        run = self.run
        return tokens_by_size(run.vision_tower, run.connector, run.image_of(stage_name), run.trust)

    def see(self, files: SourceFiles, stage_name: str, index: int | None, sample_id: str | None) -> SeenSample:
        """Find a record by its 0-based position or by its id, and make of it what the stage would.

        Raises:
            DataError: there is no such record, it has a fault, or one of its images has.
            UserError: as `renderer`.
        """
        number, sample = _find(files, index, sample_id)
        template, render, decode = self.renderer(stage_name)
        rendered = render(sample)
        tokens, images = [], 0
        for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
            is_image = token == IMAGE_TOKEN_ID
            tokens.append(Token("" if is_image else decode(token), label != IGNORE_INDEX, images if is_image else None))
            images += is_image
        stage: RecipeStage = self.run.recipe.stages[stage_name]
        seen = tuple(self._see_image(files, sample, name, stage_name) for name in sample.images)
        return SeenSample(files, number, sample, stage_name, template.name, stage.max_length, tuple(tokens), seen)

    def _see_image(self, files: SourceFiles, sample: Sample, name: str, stage_name: str) -> SeenImage:
        spec = self.run.image_of(stage_name)
        if (video := video_path(name)) is not None:
            assert files.sampling is not None, "records with videos are refused without one"
            frames = sample_frames(find_video(files.images, video, files.follow_links), files.sampling)
            shown = map(ImageTransform.of(spec).one_view, frames)
            pictures = tuple(_picture(frame, spec.mean, spec.std) for frame in shown)
            return SeenImage(video, frames[0].size, pictures, video=True)
        data = sample.embedded.get(name)
        place = safe_path(files.images, name, files.follow_links) if data is None else io.BytesIO(data)
        image = open_image(place, upright=files.upright)
        pixels = ImageTransform.of(spec)(image)
        tiles = pixels if pixels.ndim == 4 else pixels[None]  # (T, 3, H, W)
        return SeenImage(name, image.size, tuple(_picture(tile, spec.mean, spec.std) for tile in tiles))

    def _root(self) -> Path:
        if self.run.data.root is not None:
            return Path(self.run.data.root).absolute()
        graph = build_graph(self.run, _Checkpoints(StoreLayout(self.run.store).fingerprints))
        digest = next(stage.parents["data"] for stage in graph if stage.kind == "prepare")
        return self._output(graph, digest)

    def _output(self, graph: StageGraph, digest: str) -> Path:
        stage = graph[digest]
        if not self._store.is_complete(stage):
            raise UserError(
                f"{stage.kind} {stage.name} is made by the run itself, and {self._store.root} does not have it yet. "
                "Give the same words to tinylmm-train first, or name the store that has it with store=FOLDER."
            )
        return self._store.output(stage)


class _Checkpoints:
    """Fingerprints of local checkpoints alone: nothing here depends on what the data is, and it may be large."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def source(self, data: DataSpec, name: str) -> Content:
        return {}

    def benchmark(self, spec: EvalSpec) -> Content:
        return {}

    def checkpoint(self, path_or_id: str) -> Content:
        return checkpoint_fingerprint(path_or_id, self.cache)

    def model(self, folder: str) -> Content:
        return {}

    def stage_of(self, model: str) -> None:
        return None


def _is_of(stage: Stage, name: str) -> bool:
    """Whether a prepare stage belongs to a training stage; those of a mixture share template and tokenizer."""
    return stage.name == f"prepare[{name}]" or stage.name.startswith(f"prepare[{name}/")


class _Decoder:
    """Token id -> text as it stands in the whole, spaces included."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        raw = str(self.tokenizer.convert_ids_to_tokens(token))  # type: ignore[attr-defined]
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))  # type: ignore[attr-defined]
        if "\ufffd" in text or not text:
            return raw  # a part of a character, or a lone space that decoding drops
        return f" {text}" if raw.startswith("\u2581") and not text.startswith(" ") else text


def _find(files: SourceFiles, index: int | None, sample_id: str | None) -> tuple[int, Sample]:
    number = -1
    records = read_samples(files.annotations, files.layout, videos=files.sampling is not None)
    for number, record in enumerate(islice(records, files.limit)):
        if (record.sample_id != sample_id) if sample_id is not None else (number != index):
            continue
        if isinstance(record, BadRecord):
            raise DataError(f"{files.annotations}: record {number} (id '{record.sample_id}'): {record.reason}.")
        return number, record
    what = f"no record has the id '{sample_id}'" if sample_id is not None else f"there is no record {index}"
    raise DataError(f"{files.annotations}: {what} among {number + 1}. Records are counted from 0.")


def _picture(tile: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A tower's input (3, H, W) as an image again."""
    pixels = tile * tile.new_tensor(std)[:, None, None] + tile.new_tensor(mean)[:, None, None]
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
