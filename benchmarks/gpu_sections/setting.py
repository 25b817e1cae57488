"""What all sections share: the device and its measures, the shapes, the samples, and where results go."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from tinylmm.config.compose import compose_run
from tinylmm.config.spec import RunSpec
from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.sizing.cards import REACHED, card_named

LLMS = ("phi2", "tinyllama", "qwen2_5_0_5b")
STAGES = ("pretrain", "finetune")
BATCH = {"pretrain": 256, "finetune": 128}
"""Samples of an optimiser step, as in the published recipes."""
QUARTER = 4
PHOTOS = 64
"""Distinct JPEGs, of 640 x 480."""
TINY = {
    "llm": "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 2048, "
    "num_key_value_heads: 2, max_position_embeddings: 1024, bos_token_id: 1, eos_token_id: 2}",
    "vision_tower": "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, image_size: 56}",
}


@dataclass
class Setting:
    """One call of the benchmark.

    Attributes:
        device: cuda or cpu.
        tiny: small shapes, few samples.
        llms: whose shapes are measured; sections that take one take the first.
        folder: for files that are needed on the way.
        emit: takes a row of a section as soon as it is measured.
        rows: what was emitted before, by this section or earlier ones.
        timed: optimiser steps that count, behind a first one that does not: it compiles, loads kernels and makes the
            optimiser's state.
        parts: a step has this part of the recipe's samples alone, where whole ones take too long.
    """

    device: torch.device
    tiny: bool
    llms: tuple[str, ...]
    folder: Path
    emit: Callable[[dict[str, Any]], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    timed: int = 1
    parts: int = 1

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """Of training: bf16, and fp32 on a CPU, where a stage in bf16 refuses to run."""
        return "bf16" if self.on_gpu else "fp32"

    def batch(self, stage: str) -> int:
        """Samples of an optimiser step."""
        return 4 if self.tiny else BATCH[stage] // self.parts

    @property
    def steps(self) -> int:
        """Optimiser steps of a training, with the first, which is not counted."""
        return 1 + (1 if self.tiny else self.timed)

    def compose(self, llm: str, *words: str) -> RunSpec:
        """A run at real shapes with random weights, its trainings as many steps long as are measured."""
        said = [f"llm={llm}", "llm.init=random", "vt=siglip", "vision_tower.init=random", "recipe=base", "eval=none"]
        said += [f"launch.device={self.device.type}", "launch.cache_features=false", "tracking.tensorboard=false"]
        said += [f"launch.compile={str(self.on_gpu).lower()}"]  # as a stage that is long enough has it by itself
        for stage in STAGES:
            own = f"recipe.stages.{stage}"
            said += [f"++{own}.global_batch={self.batch(stage)}", f"++{own}.max_steps={self.steps}"]
            said += [f"++{own}.precision={self.precision}"]
        if self.tiny:
            said += [f"{part}.architecture={fields}" for part, fields in TINY.items()] + ["vision_tower.image.size=56"]
        card = card_named(torch.cuda.get_device_name()) if self.on_gpu else None
        said += [] if card is None else [f"launch.gpu={card.key}"]
        return compose_run([*said, *words])

    def say(self, **row: Any) -> None:
        """Emit a row, and keep it."""
        self.rows.append(row)
        self.emit(row)

    # -------------------------------------------------------------------------------------------- measures

    def sync(self) -> None:
        """Wait until the device has done all that it was asked."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Let what nobody holds go, and measure the memory's peak anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_gib(self) -> float:
        """Memory at its peak: of tensors on the GPU, of the whole process on a CPU."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**30
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20

    def measured_flops(self) -> float | None:
        """FLOP/s of a large product in the precision of training, from the section `machine`; None where it did not run."""
        return next((row["matmul_tflops"] * 1e12 for row in self.rows if row["section"] == "machine"), None)

    def sheet_flops(self) -> float | None:
        """FLOP/s of the card's data sheet in bf16; None of a card that `sizing/cards.yaml` does not have."""
        card = card_named(torch.cuda.get_device_name()) if self.on_gpu else None
        return None if card is None else card.matmul_flops / REACHED


# ------------------------------------------------------------------------------------------------ samples


def draw(stage: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int], bool]]:
    """Ids, labels and whether there is an image.

    Captions of 20 to 60 tokens, all learnt; conversations of 40 to 500 tokens, mostly short ones, of which a fifth is learnt,
    every twelfth without an image.
    """
    made = random.Random(0)
    rows = []
    for number in range(count):
        length = made.randrange(20, 60) if stage == "pretrain" else int(40 + 460 * made.random() ** 2)
        ids = [made.randrange(5, vocabulary - 10) for _ in range(length)]
        unlearnt = 0 if stage == "pretrain" else int(length * 0.8)
        labels = [IGNORE_INDEX] * unlearnt + ids[unlearnt:]
        rows.append((ids, labels, stage == "pretrain" or number % 12 != 0))
    return rows


def photo(number: int) -> str:
    """Name of the image of a sample."""
    return f"{number % PHOTOS}.jpg"


def write_photos(folder: Path, count: int = PHOTOS) -> None:
    """JPEGs of 640 x 480 as a camera's: soft shapes and some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / photo(number)
        if path.exists():
            continue
        coarse = Image.effect_noise((20, 15), 90).resize((640, 480), Image.Resampling.BICUBIC)
        fine = Image.effect_noise((640, 480), 12)
        draft = path.with_suffix(f".{os.getpid()}")
        Image.merge("RGB", (coarse, Image.blend(coarse, fine, 0.2), fine)).save(draft, "JPEG", quality=90)
        draft.replace(path)


def write_prepared(setting: Setting, stage: str, vocabulary: int) -> Path:
    """The samples of a training as a `prepare` stage leaves them, beside their photos; returns the folder of both."""
    folder = setting.folder / f"{stage}-{vocabulary}-{setting.batch(stage)}-{setting.steps}"
    if (folder / "samples").exists():
        return folder
    rows = draw(stage, setting.batch(stage) * setting.steps, vocabulary)
    write_photos(folder / "images", PHOTOS if len(rows) > PHOTOS else len(rows))
    records = {
        "sample_id": [str(number) for number in range(len(rows))],
        "input_ids": [[IMAGE_TOKEN_ID, *ids] if image else ids for ids, _, image in rows],
        "labels": [[IGNORE_INDEX, *labels] if image else labels for _, labels, image in rows],
        "images": [[photo(number)] if image else [] for number, (_, _, image) in enumerate(rows)],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(records).save_to_disk(str(folder / "samples"))
    (folder / "a.json").write_text(json.dumps([]), encoding="utf-8")
    return folder


def learnt_a_sample(folder: Path) -> float:
    """Mean number of a sample's tokens that are learnt."""
    rows = datasets.load_from_disk(str(folder / "samples"))["labels"]
    return sum(label != IGNORE_INDEX for labels in rows for label in labels) / len(rows)
