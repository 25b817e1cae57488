"""The parts of a run as layers, from what its spec says of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinylmm.config.hub import known_architecture
from tinylmm.config.spec import ImageSpec, PretrainedPart, RunSpec
from tinylmm.sizing.connectors import connector_part, takes_clips
from tinylmm.sizing.layers import Part, UnknownShapeError
from tinylmm.sizing.llms import llm_part
from tinylmm.sizing.tiling import Tiling
from tinylmm.sizing.towers import TowerOutputShape, tower_part

TYPICAL_IMAGE = (640, 480)
"""Width and height that a tiled image is taken to have, as most of COCO's."""


@dataclass(frozen=True)
class Shapes:
    """Parts of a run in one stage.

    Attributes:
        parts: by name.
        views: times that the tower sees an image: its tiles.
        view_bytes: of a view before it is normalised.
        image_tokens: positions that an image takes.
        together: whether the connector takes all frames of a clip together, into as many positions as an image has.
    """

    parts: dict[str, Part]
    views: int
    view_bytes: int
    image_tokens: int
    together: bool = False

    @property
    def frame_tokens(self) -> int:
        """Positions that each frame of a clip adds to it."""
        return 0 if self.together else self.parts["connector"].tokens

    def clip_tokens(self, frames: int) -> int:
        """Positions that a clip of so many frames takes."""
        return self.image_tokens if self.together else frames * self.frame_tokens

    def with_clips(self, run: RunSpec, frames: int) -> Shapes:
        """The parts where the connector is given clips of so many frames, if it takes them together."""
        if not self.together:
            return self
        tower, llm = self.parts["vision_tower"], self.parts["llm"]
        widths = (tower.width, frames * tower.tokens, llm.width)
        connector = connector_part(run.connector.target, run.connector.options, *widths, tiled=False)
        return replace(self, parts={**self.parts, "connector": connector})


def shapes_of(run: RunSpec, stage: str) -> Shapes:
    """The three parts of a run, as a stage of its recipe sees images.

    Raises:
        UnknownShapeError: one of them is a class of the user's, of another family, or not here yet.
    """
    image = run.image_of(stage)
    tower = _tower(run, image)
    llm = _named("llm", run.llm)
    tiled = image.mode == "anyres"
    try:
        connector = connector_part(
            run.connector.target, run.connector.options, tower.width, tower.tokens, llm.width, tiled
        )
    except UnknownShapeError as error:
        raise UnknownShapeError(f"connector: {error}") from error
    parts = {"vision_tower": tower, "connector": connector, "llm": llm}
    if not tiled:
        return Shapes(parts, 1, 3 * image.size**2, connector.tokens, takes_clips(run.connector.target))
    tiling = Tiling(image.size, image.tiles)
    tokens = tiling.num_tokens(*TYPICAL_IMAGE, round(connector.tokens**0.5))
    return Shapes(parts, tiling.num_tiles(*TYPICAL_IMAGE), 3 * image.size**2, tokens)


def _tower(run: RunSpec, image: ImageSpec) -> Part:
    spec = run.vision_tower
    output = TowerOutputShape(image.size, spec.select_layer, spec.select, spec.drop_first_token)
    config = _architecture("vision_tower", spec)
    try:
        return tower_part(spec.target, spec.encoder, config, output)
    except UnknownShapeError as error:
        raise UnknownShapeError(f"vision_tower: {error}") from error


def _named(role: str, part: PretrainedPart) -> Part:
    config = _architecture(role, part)
    try:
        return llm_part(part.target, config)
    except UnknownShapeError as error:
        raise UnknownShapeError(f"{role}: {error}") from error


def _architecture(role: str, part: PretrainedPart) -> dict[str, object]:
    config = known_architecture(part)
    if config is None:
        raise UnknownShapeError(f"{role}: the config.json of '{part.pretrained}' is not on this machine yet")
    return config


def where_from(run: RunSpec, role: str) -> str:
    """Where the shape of a run's LLM or vision tower comes from, in words."""
    part: PretrainedPart = getattr(run, role)
    if run.recipe.from_model is not None:
        return f"of the model {run.recipe.from_model}"
    if part.init != "pretrained":
        return f"as {part.name}'s YAML has it"
    return f"as published ({part.name}'s YAML)" if part.architecture else f"config.json of {part.pretrained}"
