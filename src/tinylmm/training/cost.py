"""What a training's samples cost in FLOPs, counted as `tinylmm plan` does, and what the device at hand can do."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tinylmm.models.checkpoint import LoadedModel
from tinylmm.sizing.cards import card_named, read_calibration, sheet_flops
from tinylmm.sizing.connectors import connector_part
from tinylmm.sizing.flops import Flops, Sample, sample_flops
from tinylmm.sizing.layers import Part, UnknownShapeError
from tinylmm.sizing.llms import llm_part
from tinylmm.sizing.parameters import Tune
from tinylmm.sizing.towers import TowerOutputShape, tower_part
from tinylmm.training.ranks import world_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peak:
    """What the devices of a training do together at most.

    Attributes:
        sheet: FLOP/s on the data sheet of `title`; None for a CPU, and for a card that sizing/cards.yaml does not have.
        measured: FLOP/s that `tinylmm doctor --calibrate` measured here; None where nobody has.
        title: of a device, with the type that products are computed in.
    """

    sheet: float | None
    measured: float | None
    title: str

    @classmethod
    def here(cls, device: torch.device, precision: str) -> Peak:
        """Of this training's ranks. Ranks on a CPU share one machine's rate."""
        width = 4 if precision == "fp32" else 2
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        card, measured = card_named(name) if on_gpu else None, read_calibration(name)
        devices = world_size() if on_gpu else max(1, world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        rate = None if measured is None else measured.fp32_flops if width == 4 else measured.matmul_flops
        return cls(
            None if card is None else sheet_flops(card, width) * devices,
            None if rate is None else rate * devices,
            f"{name if card is None else card.title}, {precision}",
        )


@dataclass(frozen=True)
class Cost:
    """FLOPs of samples on some devices.

    Attributes:
        parts: by name; None where what one of them looks like is not known, and so what it costs.
        tune: how each is trained.
        cached: whether the tower's features are read and not computed.
        peak: of the devices.
    """

    parts: Mapping[str, Part] | None
    tune: Mapping[str, Tune]
    cached: bool
    peak: Peak

    def flops(self, samples: float, tokens: float, squared: float, supervised: float, views: float) -> float | None:
        """Of so many samples, whose tokens, squares of lengths, learnt tokens and images are summed; None: not known."""
        if self.parts is None or not samples:
            return None
        mean = Sample(tokens / samples, squared / samples, supervised / samples, views / samples)
        return samples * sum(sample_flops(self.parts, self.tune, mean, self.cached).values(), Flops()).total

    def shares(
        self, samples: float, tokens: float, squared: float, supervised: float, views: float
    ) -> dict[str, float]:
        """Seconds that samples take at the data sheet's rate (`mfu`) and at the measured one (`peak_share`).

        Over the seconds that they took, these are the shares. What is computed twice (checkpointing) counts once.
        """
        flops = self.flops(samples, tokens, squared, supervised, views)
        rates = {"mfu": self.peak.sheet, "peak_share": self.peak.measured}
        return {} if flops is None else {name: flops / rate for name, rate in rates.items() if rate is not None}


def parts_of(loaded: LoadedModel) -> dict[str, Part] | None:
    """The parts of a model in layers, before adapters are put on it; None, said once, where one is not known."""
    described, model = loaded.description, loaded.model
    entry, image = described.vision_tower, described.image
    read = TowerOutputShape(image.size, entry.select_layer, entry.select, entry.drop_first_token)
    try:
        tower = tower_part(entry.target, entry.encoder, model.vision_tower.config.to_dict(), read)
        llm = llm_part(described.llm.target, model.config.to_dict())
        joined = described.connector
        connector = connector_part(joined.target, joined.options, tower.width, tower.tokens, llm.width, model.tiled)
    except UnknownShapeError as error:
        log.info("FLOPs are not known, so rows say no MFU: %s", error)
        return None
    return {"vision_tower": tower, "connector": connector, "llm": llm}
