"""What is installed, what this machine can do, which fast paths are active and why others are not (`tinylmm doctor`)."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tinylmm.config.cores import usable_cores
from tinylmm.config.gpus import visible_gpus
from tinylmm.models.attention import why_no_flash
from tinylmm.sizing.cards import cache_folder, card_named, read_calibration
from tinylmm.sizing.memory import GIB
from tinylmm.training.pipes import ENOUGH_BYTES, shared_memory_bytes
from tinylmm.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "deepspeed", "pillow", "hydra-core", "wandb")
EXTRAS = {"flash-attn": "gpu", "bitsandbytes": "qlora", "av": "video", "gguf": "gguf", "lmms-eval": "lmms"}
"""Optional packages and the extra of tinylmm that brings each."""
FEW_CORES = 8
"""Below so many cores a GPU, images are read more slowly than an H200 takes them: one reads about 95 a second
(640 x 480 to 384 x 384, measured), and small LLMs train on hundreds."""
BF16_FROM = (8, 0)
"""Compute capability with matrix units for bf16 (Ampere)."""


@dataclass(frozen=True)
class FastPath:
    """Something that makes a run faster.

    Attributes:
        active: whether this machine uses it.
        why: why not, or what it does.
        fix: what to do to have it; empty where nothing can be done.
    """

    name: str
    active: bool
    why: str
    fix: str = ""


def examine(store: Path) -> dict[str, Any]:
    """Everything that doctor says, as plain JSON.

    Args:
        store: the folder whose disk counts.
    """
    gpus = _gpus()
    device = gpus[0]["name"] if gpus else "cpu"
    measured = read_calibration(device)
    paths = fast_paths()
    return {
        "tinylmm": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *EXTRAS)},
        "machine": {
            "cores": usable_cores(),
            "cores_in_all": os.cpu_count(),
            "memory": memory_bytes(),
            "shared_memory": shared_memory_bytes(),
            "gpus": gpus,
            "disks": {
                str(path): shutil.disk_usage(_existing(path)).free for path in (store.absolute(), cache_folder())
            },
        },
        "fast_paths": [asdict(path) for path in paths],
        "calibration": None if measured is None else asdict(measured),
        "faster": [path.fix for path in paths if path.fix and not path.active],
    }


def fast_paths() -> list[FastPath]:
    """What makes runs faster, each with whether this machine has it."""
    gpu = torch.cuda.is_available()
    cores, shared = usable_cores(), shared_memory_bytes()
    per_rank = cores // max(1, visible_gpus())
    reads = f"{per_rank} cores a GPU read images" if gpu else f"{cores} cores prepare data and compute"
    enough = shared >= ENOUGH_BYTES
    return [
        _gpu_path(gpu),
        _bf16_path(gpu),
        _flash_path(gpu),
        FastPath("fused AdamW", gpu, "one kernel a step on a GPU" if gpu else "on a GPU alone"),
        _package_path("DeepSpeed (launch=zero2, zero3)", "deepspeed", "shares optimiser, gradients and weights out"),
        _package_path("4 and 8 bit weights (recipe=qlora)", "bitsandbytes", "holds frozen weights in 4 or 8 bits"),
        FastPath("packing", True, "samples share rows; launch.packing"),
        FastPath("features kept", True, "a frozen tower runs once up to launch.cache_features_gib"),
        FastPath("pixels kept", True, "images of several epochs are decoded once up to launch.cache_pixels_gib"),
        FastPath(
            "shared memory for readers",
            enough,
            f"{shared / GIB:.1f} GiB in /dev/shm",
            ""
            if enough
            else "give /dev/shm at least 1 GB (docker run --shm-size=8g): readers send images by pipes now",
        ),
        FastPath(
            "cores to read with",
            not gpu or per_rank >= FEW_CORES,
            reads,
            f"{FEW_CORES} cores a GPU read images fast enough for small LLMs; or keep features (launch.cache_features_gib)",
        ),
    ]


def _gpu_path(gpu: bool) -> FastPath:
    if gpu:
        return FastPath("GPU", True, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    if not Path("/dev/nvidiactl").exists():
        return FastPath(
            "GPU", False, "no NVIDIA driver is on this machine", "train bf16 recipes on a machine with a GPU"
        )
    if torch.version.cuda is None:
        said = f"torch {torch.__version__} is built for CPUs"
        return FastPath("GPU", False, said, "install a CUDA build of torch: this machine has a driver")
    return FastPath("GPU", False, "torch sees none", "look at CUDA_VISIBLE_DEVICES and at what nvidia-smi says")


def _bf16_path(gpu: bool) -> FastPath:
    if not gpu:
        return FastPath("bf16", False, "on a GPU alone; fp32 is used here")
    capability = torch.cuda.get_device_capability()
    if capability >= BF16_FROM:
        return FastPath("bf16", True, "matrix units compute in bf16")
    return FastPath("bf16", False, f"compute capability {capability} has no matrix units for it")


def _flash_path(gpu: bool) -> FastPath:
    reason = why_no_flash("bf16", torch.device("cuda", torch.cuda.current_device())) if gpu else "needs a GPU"
    fix = "pip install 'tinylmm[gpu]' for flash-attn" if gpu and reason == "flash-attn is not installed" else ""
    return FastPath("flash-attn", reason is None, reason or "attention without masks", fix)


def _package_path(name: str, package: str, does: str) -> FastPath:
    found = _version(package)
    if found is not None:
        return FastPath(name, True, f"{does}; {package} {found}")
    extra = EXTRAS.get(package)
    fix = f"pip install 'tinylmm[{extra}]' for {package}" if extra else f"pip install {package}"
    return FastPath(name, False, f"{package} is not installed", fix)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's share of it where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or no limit
        return total


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        card = card_named(properties.name)
        known = None if card is None else card.key
        found.append({"name": properties.name, "memory": properties.total_memory, "launch.gpu": known})
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
