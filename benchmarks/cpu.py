"""A training step on this machine's CPU against transformers' Llava under its own Trainer, on the same samples.

    python -m benchmarks.cpu

Mid-size random models (a Llama of 8 blocks of width 512, a SigLIP of 196 patches, a two-layer connector; 67 million parameters
with 32,000 words) are trained as TinyLLaVA Factory trains: stage 1 the connector alone, on captions of 20 to 60 tokens; stage 2
connector and LLM, on 40 to 500 tokens of which a fifth are learnt, every twelfth sample without an image.

The other side is `LlavaForConditionalGeneration` under `transformers.Trainer` in the Factory's setting: samples padded to the
longest of a micro-batch of 16 (stage 1) or 8 (stage 2), gradient checkpointing, logits at every position, a blank image for
samples without one, AdamW, fp32. `llava_unchecked` is the same without checkpointing, which is faster and takes more memory.
Ours is `LMMTrainer` with the launch's defaults, also in fp32; features of the frozen tower are computed in every step, as
there, and only `ours_cached` reads them ready-made, as the default launch does from the second epoch on.

Seconds and peak memory are measured in processes of their own, the sides in turns, so that a busy machine disturbs all alike.
Threads wait for each other as PyTorch has them, spinning for a moment: that is faster by the clock for both sides, and counts
in the CPU seconds that stand beside it. Writes benchmarks/results/cpu.json and cpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arguments import file_to_write, whole
from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

RESULT = Path(__file__).parent / "results" / "cpu.json"
SIDES = ("llava", "llava_unchecked", "ours", "ours_cached")
VOCABULARIES = (32_000, 150_000)
MICRO_BATCH = {1: 16, 2: 8}
"""Samples that the other side takes at once, after the Factory's scripts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the models; `tiny` is for the test."""

    width: int = 512
    inner: int = 1408
    blocks: int = 8
    heads: int = 8
    tower_width: int = 256
    tower_inner: int = 1024
    tower_blocks: int = 12
    image: int = 224
    patch: int = 16

    @property
    def patches(self) -> int:
        """Image tokens."""
        return (self.image // self.patch) ** 2


SHAPES = {"mid": Shape(), "tiny": Shape(32, 64, 2, 2, 16, 32, 2, 32, 16)}
BATCHES = {"mid": {1: 32, 2: 16}, "tiny": {1: 4, 2: 4}}
"""Samples of an optimiser step."""


def draw(stage: int, count: int, vocabulary: int, seed: int = 0) -> list[tuple[list[int], list[int], bool]]:
    """Ids, labels and whether there is an image, of so many samples."""
    import torch

    made = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        if stage == 1:
            length = int(torch.randint(20, 60, (1,), generator=made))
        else:
            length = int(40 + 460 * torch.rand(1, generator=made) ** 2)
        ids = torch.randint(5, vocabulary - 10, (length,), generator=made)
        labels = ids.clone()
        if stage == 2:
            labels[: int(length * 0.8)] = -100
        rows.append((ids.tolist(), labels.tolist(), stage == 1 or number % 12 != 0))
    return rows


def llm_architecture(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """A Llama's fields."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def tower_architecture(shape: Shape) -> dict[str, Any]:
    """A SigLIP's fields."""
    return {
        "hidden_size": shape.tower_width,
        "intermediate_size": shape.tower_inner,
        "num_hidden_layers": shape.tower_blocks,
        "num_attention_heads": 4,
        "image_size": shape.image,
        "patch_size": shape.patch,
    }


# ------------------------------------------------------------------------------------------------ one measurement


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    side: str
    stage: int
    vocabulary: int
    size: str
    steps: int

    @property
    def shape(self) -> Shape:
        """Of the models."""
        return SHAPES[self.size]

    @property
    def batch(self) -> int:
        """Samples of an optimiser step."""
        return BATCHES[self.size][self.stage]


def measure(case: Case) -> dict[str, float]:
    """Train `steps` optimiser steps behind one that is not counted; rates, losses and the process' peak memory."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times at the end of each step."""

        marks: list[tuple[float, float]] = []  # noqa: RUF012 (one a process)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = _ours(case, Path(folder)) if case.side.startswith("ours") else _llava(case, Path(folder))
        trainer.add_callback(Clock())
        loss = trainer.train().training_loss
    (began, worked), (ended, done) = Clock.marks[0], Clock.marks[-1]
    samples = case.steps * case.batch
    return {
        "samples_per_s": samples / (ended - began),
        "samples_per_cpu_s": samples / (done - worked),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": loss,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def _llava(case: Case, folder: Path) -> Any:
    """transformers' own model and Trainer."""
    import torch
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
        Trainer,
        TrainingArguments,
    )

    shape, image_id = case.shape, case.vocabulary - 1
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tower_architecture(shape)),
        text_config=LlamaConfig(**llm_architecture(shape, case.vocabulary)),
        image_token_id=image_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        image_seq_length=shape.patches,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name or (case.stage == 2 and "vision_tower" not in name))
    size = MICRO_BATCH[case.stage] if case.size == "mid" else 2
    checkpointing = case.side == "llava"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=case.steps + 1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=case.batch // size,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        learning_rate=1e-5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(sample["ids"]) for sample in samples) + shape.patches
        ids, labels = torch.zeros(len(samples), width, dtype=torch.int64), torch.full((len(samples), width), -100)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):  # without an image: a blank one, as in the reference
            end = shape.patches + len(sample["ids"])
            ids[row, : shape.patches] = image_id
            ids[row, shape.patches : end] = torch.tensor(sample["ids"])
            labels[row, shape.patches : end] = torch.tensor(sample["labels"])
            mask[row, :end] = 1
        pixels = torch.stack([sample["pixels"] for sample in samples])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}

    rows = draw(case.stage, case.batch * (case.steps + 1), case.vocabulary)
    data = [
        {"ids": ids, "labels": labels, "pixels": _pixels(number, shape) * image}
        for number, (ids, labels, image) in enumerate(rows)
    ]
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)


def _pixels(number: int, shape: Shape) -> Any:
    """Normalised pixels (3, H, W) of an image; one of 16."""
    import torch

    made = torch.Generator().manual_seed(number % 16)
    return torch.randn(3, shape.image, shape.image, generator=made)


class _Drawn:
    """Samples and pictures as a training reads them, from memory."""

    def __init__(self, case: Case, tokens: int) -> None:
        self.case, self.tokens, self.tokenizer = case, tokens, _Padding()
        rows = draw(case.stage, case.batch * (case.steps + 1), case.vocabulary)
        self.records = [
            {
                "sample_id": str(number),
                "input_ids": [IMAGE_TOKEN_ID, *ids] if image else ids,
                "labels": [IGNORE_INDEX, *labels] if image else labels,
                "images": [str(number)] if image else [],
            }
            for number, (ids, labels, image) in enumerate(rows)
        ]
        self.sizes = [len(rows)]
        self.frames_if_any = None  # no videos

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    @property
    def lengths(self) -> Any:
        """Positions of each sample."""
        import numpy as np

        each = [len(one["input_ids"]) + (self.tokens - 1) * len(one["images"]) for one in self.records]
        return np.array(each)

    def pixels(self, name: str) -> Any:
        """Of one picture."""
        return _pixels(int(name), self.case.shape)

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of one picture."""
        return self.case.shape.image, self.case.shape.image


class _Padding:
    """What a training asks of a tokenizer."""

    pad_token_id = 0


def _identity(case: Case) -> dict[str, Any]:
    """The parts of our model, with random weights."""
    shape = case.shape
    return {
        "llm": {
            "_target_": "transformers.LlamaForCausalLM",
            "init": "random",
            "architecture": llm_architecture(shape, case.vocabulary),
        },
        "vision_tower": {
            "_target_": "tinylmm.models.vision.HFVisionTower",
            "encoder": "transformers.SiglipVisionModel",
            "init": "random",
            "architecture": tower_architecture(shape),
            "image": {"size": shape.image, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash"},
        },
        "tower_output": {"select_layer": -2, "select": "patch", "drop_first_token": False, "options": {}},
        "connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}},
    }


def _ours(case: Case, folder: Path) -> Any:
    """Our model and Trainer, wired as a stage wires them."""
    import torch

    from tests.builders import build, tuning
    from tinylmm.config.description import ModelDescription
    from tinylmm.config.identities import ConnectorIdentity, TowerOutput
    from tinylmm.config.spec import ImageSpec
    from tinylmm.models.attention import choose_training_attention
    from tinylmm.models.checkpoint import LoadedModel
    from tinylmm.models.speed import speed_up
    from tinylmm.stages.job import make_job
    from tinylmm.stages.train import build_trainer
    from tinylmm.training.machine import prepare_machine

    device = torch.device("cpu")
    prepare_machine(device)
    torch.manual_seed(0)
    identity = _identity(case)
    model = build(identity)
    tune = {"llm": "full" if case.stage == 2 else "frozen", "vision_tower": "frozen", "connector": "full"}
    tuning(model, tune)
    model.set_attention(choose_training_attention("auto", "fp32", device))
    speed_up(model, device)
    spec = {
        "tune": tune,
        "lr": 1e-5,
        "global_batch": case.batch,
        "epochs": 1,
        "max_steps": None,
        "max_length": 2048,
        "warmup_ratio": 0.0,
        "schedule": "linear",
        "weight_decay": 0.0,
        "adam_betas": (0.9, 0.999),
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "precision": "fp32",
        "seed": 0,
        "trainer": {},
    }
    settings = {"launch": {"device": "cpu"}, "tracking": {"tensorboard": False, "log_steps": 1000}}
    job = make_job("train", "stage", "ab" * 32, spec, {}, settings, folder, folder)
    drawn: Any = _Drawn(case, model.image_tokens)
    cache: Any = None
    if case.side == "ours_cached":
        with torch.no_grad():
            whole_set = {str(n): model.vision_tower(drawn.pixels(str(n))[None])[0] for n in range(16)}
        cache = lambda names: torch.stack([whole_set[str(int(name) % 16)] for name in names])  # noqa: E731
    parts = identity["llm"]["_target_"], identity["vision_tower"]["_target_"], identity["vision_tower"]["encoder"]
    described = ModelDescription.of_targets(
        *parts,
        TowerOutput.model_validate(identity["tower_output"]),
        ConnectorIdentity.model_validate(identity["connector"]),
        ImageSpec.model_validate(identity["vision_tower"]["image"]),
        template="llama",
    )
    return build_trainer(job, LoadedModel(model, drawn.tokenizer, described, None), drawn, drawn, cache, None, device)


# ------------------------------------------------------------------------------------------------ all of them


def main(words: Sequence[str] | None = None) -> int:
    """Measure every case in turns and write the results; or, with --case, one, and print it."""
    options = _parse(words)
    if options.case:
        sys.stdout.write(json.dumps(measure(Case(**json.loads(options.case)))) + "\n")
        return 0
    cases = [
        Case(side, stage, vocabulary, options.size, options.steps)
        for stage in (1, 2)
        for vocabulary in ([320] if options.size == "tiny" else VOCABULARIES)
        for side in options.sides
    ]
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            found[case].append(_in_process(case))
            _say(case, found[case][-1])
            write(found, options.size, options.output)
    return 0


def write(found: dict[Case, list[dict[str, float]]], size: str, output: Path) -> None:
    """Write what is measured so far: each case's medians, and those of its ratios to the other side."""
    record = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "size": size,
        "rows": [_row(case, found) for case, rows in found.items() if rows],
    }
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(record, output.with_suffix(".png"))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.cpu", description="Our training step against transformers' Llava."
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="mid", help="tiny is for a test")
    parser.add_argument("--rounds", type=whole(1), default=3, help="times that each side takes its turn")
    parser.add_argument("--steps", type=whole(1), default=2, help="optimiser steps that are timed")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=file_to_write, default=RESULT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _in_process(case: Case) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cpu", "--case", json.dumps(vars(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _say(case: Case, row: dict[str, float]) -> None:
    sys.stdout.write(
        f"stage {case.stage}, {case.vocabulary:7,} words, {case.side:16} {row['samples_per_s']:6.2f} samples/s  "
        f"{row['samples_per_cpu_s']:6.2f} a CPU second  peak {row['peak_mib']:6.0f} MiB  loss {row['loss']:.4f}\n"
    )
    sys.stdout.flush()


def _row(case: Case, found: dict[Case, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of a case over the rounds, and of the ratios to the other side in the same round."""
    own = found[case]
    row: dict[str, Any] = {
        **vars(case),
        "rounds": len(own),
        **{key: statistics.median(one[key] for one in own) for key in own[0]},
    }
    other = next((c for c in found if (c.side, c.stage, c.vocabulary) == ("llava", case.stage, case.vocabulary)), None)
    if other is not None and found[other]:
        for key in ("samples_per_s", "samples_per_cpu_s", "peak_mib"):
            pairs = zip(own, found[other], strict=False)  # the other side is a round ahead
            row[f"{key}_ratio"] = statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)
    return row


def _plot(record: dict[str, Any], path: Path) -> None:
    """Rates and peak memory of every side, beside the other side's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["rows"]
    groups = sorted({(row["stage"], row["vocabulary"]) for row in rows})
    sides = [side for side in SIDES if any(row["side"] == side for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, title in zip(axes, ("samples_per_s", "peak_mib"), ("samples/s", "peak memory, MiB"), strict=True):
        for number, side in enumerate(sides):
            of_side = {(row["stage"], row["vocabulary"]): row[key] for row in rows if row["side"] == side}
            places = [place + number / (len(sides) + 1) for place in range(len(groups))]
            bars = axis.bar(places, [of_side.get(group, 0.0) for group in groups], 1 / (len(sides) + 1), label=side)
            axis.bar_label(bars, fmt="%.3g", fontsize=6)
        middle = (len(sides) - 1) / (2 * (len(sides) + 1))
        names = [f"stage {stage}\n{vocabulary:,} words" for stage, vocabulary in groups]
        axis.set_xticks([place + middle for place in range(len(groups))], names)
        axis.set_title(title)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
