"""A saved model's config.json: what its parts are and how they fit together. No torch.

It lies beside the parts' own folders (`models/checkpoint.py`), and is all that loading a model needs to know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from tinylmm.config.identities import ConnectorIdentity, PartIdentity, Recorded, TowerIdentity, TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.config.video import SamplingSpec
from tinylmm.errors import IntegrityError
from tinylmm.version import __version__

CONFIG_FILE = "config.json"
MODEL_TYPE = "tinylmm"
FORMAT = 1


class LLMEntry(Recorded):
    """Which class the LLM is of; its own config.json has the rest."""

    target: str = Field(alias="_target_")


class TowerEntry(Recorded):
    """Which classes tower and encoder are of, and how the tower's output is read (`TowerOutput`)."""

    target: str = Field(alias="_target_")
    encoder: str
    select_layer: int = -2
    select: Literal["patch", "all"] = "patch"
    drop_first_token: bool = False
    options: dict[str, object] = Field(default_factory=dict)

    @property
    def output(self) -> TowerOutput:
        """How its output is read."""
        return TowerOutput(**{name: value for name, value in self if name in TowerOutput.model_fields})


class QuantizationEntry(Recorded):
    """How an adapter's base weights were held in training (`QLoraSpec` has the meanings)."""

    bits: int
    quant_type: str
    double_quant: bool


class AdapterEntry(Recorded):
    """A part's adapter; its base weights were whole in training where `quantization` is None."""

    quantization: QuantizationEntry | None


class ModelDescription(Recorded):
    """config.json of a saved model."""

    model_type: Literal["tinylmm"]
    format: int = FORMAT
    tinylmm_version: str | None = None
    """That wrote it."""
    llm: LLMEntry
    vision_tower: TowerEntry
    connector: ConnectorIdentity
    image: ImageSpec
    template: str
    scale_image_features: bool = False
    sampling: SamplingSpec | None = None
    """The frames of a clip that it was trained with."""
    origin: dict[str, str] | None = None
    """Part -> where an imported model's part came from."""
    adapters: dict[str, AdapterEntry] | None = None
    """Part -> its adapter, where the part's folder holds the base alone."""

    @classmethod
    def of(
        cls,
        llm: PartIdentity,
        tower: TowerIdentity,
        output: TowerOutput,
        connector: ConnectorIdentity,
        template: str,
        scale_image_features: bool = False,
    ) -> Self:
        """Return the description of a model of these parts."""
        targets = (llm.target, tower.target, tower.encoder)
        return cls.of_targets(*targets, output, connector, tower.image, template, scale_image_features)

    @classmethod
    def of_targets(
        cls,
        llm: str,
        tower: str,
        encoder: str,
        output: TowerOutput,
        connector: ConnectorIdentity,
        image: ImageSpec,
        template: str,
        scale_image_features: bool = False,
        origin: dict[str, str] | None = None,
    ) -> Self:
        """Return the description of a model of these classes; `origin` is where an imported model's parts came from."""
        fields = {
            "model_type": MODEL_TYPE,
            "format": FORMAT,
            "tinylmm_version": __version__,
            "llm": {"_target_": llm},
            "vision_tower": {"_target_": tower, "encoder": encoder, **output.as_json()},
            "connector": connector.as_json(),
            "image": image.model_dump(mode="json", exclude_unset=True),
            "template": template,
        }
        fields |= {"scale_image_features": True} if scale_image_features else {}
        return cls.model_validate(fields | ({} if origin is None else {"origin": origin}))

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Read a model folder's config.json.

        Raises:
            IntegrityError: it is missing, or describes no model of this version.
        """
        path = folder / CONFIG_FILE
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise IntegrityError(f"{folder} is no tinylmm model: {CONFIG_FILE} is missing") from error
        except (ValidationError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, first["loc"])) or "the file"
            raise IntegrityError(f"{path} does not describe a model: {where}: {first['msg']}.") from error

    def without_adapters(self) -> Self:
        """The description of the model once its adapters are merged."""
        return type(self).model_validate({key: value for key, value in self.as_json().items() if key != "adapters"})

    def with_image(self, image: ImageSpec) -> Self:
        """The description of the model once it sees images like this."""
        return type(self).model_validate(self.as_json() | {"image": image.model_dump(mode="json", exclude_unset=True)})

    def with_sampling(self, sampling: SamplingSpec) -> Self:
        """The description of the model once it was trained with these frames of clips."""
        return type(self).model_validate(self.as_json() | {"sampling": sampling.given()})

    def with_adapters(self, adapters: dict[str, AdapterEntry]) -> Self:
        """The description of the model with these adapters beside their bases; none at all leaves it as it is."""
        entries = {part: entry.as_json() for part, entry in adapters.items()}
        return type(self).model_validate(self.as_json() | {"adapters": entries}) if entries else self
