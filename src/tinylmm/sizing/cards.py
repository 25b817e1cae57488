"""What a device can do: the cards of cards.yaml, or this machine as `tinylmm doctor --calibrate` has measured it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

REACHED = 0.8
"""Share of a data sheet's rate that a large matrix product reaches: 799 of 989 TFLOP/s were measured on an H200."""
COPIED = 0.88
"""And of its bandwidth that a copy reaches: 4.25 of 4.8 TB/s were measured there."""
DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Card:
    """One device.

    Attributes:
        key: as launch.gpu names it; `cpu` for a machine without one.
        memory_bytes: of the device.
        matmul_flops: FLOP/s that a large matrix product reaches in bf16 (on a CPU in fp32),
        fp32_flops: and in fp32.
        copy_bytes: bytes a second that its memory reads and writes.
        source: where the figures come from.
        images_per_s: that one process reads; None where nobody measured it.
    """

    key: str
    title: str
    memory_bytes: float
    matmul_flops: float
    fp32_flops: float
    copy_bytes: float
    source: str
    images_per_s: float | None = None

    def product_flops(self, compute_bytes: int) -> float:
        """FLOP/s of products in numbers of so many bytes."""
        return self.fp32_flops if compute_bytes == 4 else self.matmul_flops


@dataclass(frozen=True)
class Calibration:
    """What `tinylmm doctor --calibrate` measured of a machine.

    Attributes:
        device: the GPU's name, or `cpu`.
        matmul_flops, fp32_flops: FLOP/s of a large product, in bf16 on a GPU and in fp32 on a CPU; and in fp32.
        copy_bytes: bytes a second read and written by a large copy.
        images_per_s: JPEGs of 640 x 480 that one process decodes and resizes to 384 x 384.
    """

    device: str
    memory_bytes: float
    matmul_flops: float
    fp32_flops: float
    copy_bytes: float
    images_per_s: float


@cache
def cards() -> dict[str, Card]:
    """The cards of cards.yaml by their key."""
    text = resources.files("tinylmm.sizing").joinpath("cards.yaml").read_text(encoding="utf-8")
    return {
        key: Card(
            key,
            row["title"],
            row["memory_gb"] * 1e9,
            row["bf16_tflops"] * 1e12 * REACHED,
            row["fp32_tflops"] * 1e12 * REACHED,
            row["bandwidth_gbps"] * 1e9 * COPIED,
            row["source"],
        )
        for key, row in yaml.safe_load(text).items()
    }


def sheet_flops(card: Card, compute_bytes: int) -> float:
    """FLOP/s that the data sheet of a card of cards.yaml says of products in numbers of so many bytes."""
    return card.product_flops(compute_bytes) / REACHED


@cache
def _names() -> dict[str, tuple[str, ...]]:
    text = resources.files("tinylmm.sizing").joinpath("cards.yaml").read_text(encoding="utf-8")
    return {key: tuple(row["matches"]) for key, row in yaml.safe_load(text).items()}


def gpu_names(driver: Path = DRIVER) -> list[str]:
    """Names of this machine's NVIDIA GPUs as their driver lists them, found without torch."""
    found = []
    for path in sorted(driver.glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def card_named(name: str) -> Card | None:
    """The card that a driver calls `name`; None where cards.yaml has none like it."""
    return next((cards()[key] for key, words in _names().items() if all(word in name for word in words)), None)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/tinylmm`, by default `~/.cache/tinylmm`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tinylmm"


def _calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def save_calibration(measured: Calibration) -> Path:
    """Keep what was measured of this machine; returns the file."""
    path = _calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def read_calibration(device: str) -> Calibration | None:
    """What was measured of this machine's `device`; None where nothing was, or of another device."""
    try:
        found = Calibration(**json.loads(_calibration_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.device == device else None


def this_machine(gpus: Sequence[str] | None = None) -> Card | None:
    """This machine's own device, as measured or as its data sheet says; None where neither is known."""
    names = gpu_names() if gpus is None else gpus
    device = names[0] if names else "cpu"
    if (measured := read_calibration(device)) is not None:
        rates = (measured.memory_bytes, measured.matmul_flops, measured.fp32_flops, measured.copy_bytes)
        return Card("this machine", device, *rates, "measured by tinylmm doctor --calibrate", measured.images_per_s)
    return card_named(device)
