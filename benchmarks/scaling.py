"""How seconds and peak memory grow with sequence length, batch, vocabulary, number of images and size of the data.

    python -m benchmarks.scaling                                 # on a CPU; some minutes
    python -m benchmarks.scaling --axes length,data --note "quiet machine"

Of a training step (forward, backward and AdamW of a Llama of 4 blocks of width 256 behind a SigLIP of 64 image tokens, random
weights, fp32) one size grows while the others stay; of the data, what opening prepared samples and reading one batch of them
takes. Each point is a process of its own. Seconds are those of all cores together, so that a busy machine stretches them
little; the clock's stand beside them. Memory is what the process holds at its peak over what it held when model and data were
there and a small step had been done.

Between the three largest points of each axis a power of the size is fitted: 1 is linear, 2 quadratic, 0 constant. Writes
benchmarks/results/scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import choices, file_to_write

RESULT = Path(__file__).parent / "results" / "scaling.json"
FITTED = 3
"""Points of an axis, the largest ones, that its exponents are fitted to."""
STEPS = 2
"""Times that each is done; the quickest counts."""
WITHOUT_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Freed memory goes back at once, and threads that wait do not count as work."""
IMAGE, PATCH = 112, 14


@dataclass(frozen=True)
class Shape:
    """Sizes of one step."""

    length: int = 512
    batch: int = 1
    vocabulary: int = 8192
    images: int = 0


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        sizes: that are measured, and
        tiny: those of the test.
        fixed: what stays.
    """

    title: str
    sizes: tuple[int, ...]
    tiny: tuple[int, ...]
    fixed: Shape | None = None


AXES = {
    "length": Axis("tokens of one sample", (256, 512, 1024, 2048), (16, 32, 64), Shape()),
    "batch": Axis("samples of 256 tokens", (1, 2, 4, 8), (1, 2, 4), Shape(length=256)),
    "vocabulary": Axis("words, 512 learnt tokens", (8192, 16384, 32768, 65536), (300, 600, 1200), Shape()),
    "images": Axis("images of a sample", (1, 2, 4, 8), (1, 2, 3), Shape(length=128, images=1)),
    "data": Axis("prepared samples", (1000, 10_000, 100_000), (10, 100, 1000)),
}


# ------------------------------------------------------------------------------------------------ one point


def measure(axis: str, size: int, tiny: bool) -> dict[str, float]:
    """Seconds of the quickest try, of all cores and of the clock, and MiB at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        work, small = _data(size, Path(folder)) if axis == "data" else _step(axis, size, tiny)
        small()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        tries = []
        for _ in range(STEPS):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            tries.append((time.process_time() - cpu, time.perf_counter() - wall))
            gc.collect()
    return {
        "cpu_s": min(t[0] for t in tries),
        "wall_s": min(t[1] for t in tries),
        "peak_mib": _status("VmHWM") - before,
    }


def _status(key: str) -> float:
    """A line of the kernel's account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def _step(axis: str, size: int, tiny: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step of this size, and one of few tokens that loads the code."""
    import torch

    from tinylmm.constants import IMAGE_TOKEN_ID
    from tinylmm.models.attention import choose_training_attention

    fixed = AXES[axis].fixed
    assert fixed is not None, "all axes but the data's are of a step"
    shape = Shape(**vars(fixed) | {axis: size})
    model = _model(16 if tiny else 256, 2 if tiny else 4, shape.vocabulary)
    model.set_attention(choose_training_attention("auto", "fp32", torch.device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(length: int, batch: int, images: int) -> None:
        made = torch.Generator().manual_seed(0)
        text = torch.randint(3, shape.vocabulary, (batch, length), generator=made)
        slots = torch.full((batch, images * model.image_tokens), IMAGE_TOKEN_ID)
        ids = torch.cat([text[:, :1], slots, text[:, 1:]], dim=1)
        targets = torch.full_like(ids, -100)
        targets[:, slots.shape[1] : -1] = ids[:, slots.shape[1] + 1 :]
        positions = torch.arange(ids.shape[1]).repeat(batch, 1)
        pixels = torch.randn(batch * images, 3, IMAGE, IMAGE, generator=made) if images else None
        output = model(ids, positions, targets, pixel_values=pixels)
        (output.loss_sum / output.num_supervised).backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: step(shape.length, shape.batch, shape.images), lambda: step(8, 1, min(shape.images, 1))


def _model(width: int, blocks: int, vocabulary: int) -> Any:
    """A random model, all of it trained but the tower."""
    import torch

    from tests.builders import build

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = build(
        {
            "llm": {
                "_target_": "transformers.LlamaForCausalLM",
                "init": "random",
                "architecture": {
                    "vocab_size": vocabulary,
                    "hidden_size": width,
                    "intermediate_size": 3 * width,
                    "num_hidden_layers": blocks,
                    "max_position_embeddings": 8192,
                    **heads,
                },
            },
            "vision_tower": {
                "_target_": "tinylmm.models.vision.HFVisionTower",
                "encoder": "transformers.SiglipVisionModel",
                "init": "random",
                "architecture": {
                    "hidden_size": width,
                    "intermediate_size": 4 * width,
                    "num_hidden_layers": blocks,
                    "num_attention_heads": 4,
                    "image_size": IMAGE,
                    "patch_size": PATCH,
                },
                "image": {"size": IMAGE, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash"},
            },
            "tower_output": {"select_layer": -2, "select": "patch", "drop_first_token": False, "options": {}},
            "connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}},
        }
    ).train()
    model.vision_tower.requires_grad_(False)
    return model


def _data(size: int, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """What a training does with so many prepared samples before its first step."""
    from tinylmm.data.collate import Collator
    from tinylmm.training.dataset import PreparedSamples
    from tinylmm.training.sampler import StepSampler

    def first_batch(source: Path) -> None:
        samples = PreparedSamples([source], 64, 2048)
        sampler = StepSampler(len(samples), 10, 8, 1.0, 0, 8, 0, 1, None)
        Collator(64, 0, 2048, True, None, 2048)([samples[index] for index in next(iter(sampler))])

    for name, count in (("small", 10), ("all", size)):
        _write_prepared(folder / name, count)
    return lambda: first_batch(folder / "all"), lambda: first_batch(folder / "small")


def _write_prepared(folder: Path, count: int) -> None:
    """Samples of one image and 60 to 120 tokens each, a piece at a time."""
    import datasets

    from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
    from tinylmm.stages.rendering import SCHEMA

    def pieces() -> Any:
        for number in range(count):
            length = 60 + number % 60
            ids = [IMAGE_TOKEN_ID, *range(3, 2 + length)]
            labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
            yield {"sample_id": str(number), "input_ids": ids, "labels": labels, "images": [f"{number}.jpg"]}

    datasets.disable_progress_bars()
    features = datasets.Features.from_arrow_schema(SCHEMA)
    made = datasets.Dataset.from_generator(pieces, features=features, cache_dir=str(folder / "cache"))
    made.save_to_disk(str(folder / "samples"))


# ------------------------------------------------------------------------------------------------ all of them


def main(words: Sequence[str] | None = None) -> int:
    """Measure every axis and write the results; or, with --point, one point, and print it."""
    options = _parse(words)
    if options.point:
        axis, size = options.point.split("=")
        sys.stdout.write(json.dumps(measure(axis, int(size), options.tiny)) + "\n")
        return 0
    found = {}
    for name in options.axes:
        axis = AXES[name]
        sizes = axis.tiny if options.tiny else axis.sizes
        points = [{"size": size, **_in_process(name, size, options.tiny)} for size in sizes]
        exponents = {key: exponent(sizes, [point[key] for point in points]) for key in ("cpu_s", "peak_mib")}
        found[name] = {"title": axis.title, "points": points, "exponents": exponents}
        fixed = {} if axis.fixed is None else {key: v for key, v in vars(axis.fixed).items() if key != name}
        found[name] |= {"fixed": fixed}
        said = ", ".join(f"{p['size']:,}: {p['cpu_s']:.3g} s {p['peak_mib']:.0f} MiB" for p in points)
        powers = ", ".join(f"{key} ~ size^{value:.2f}" for key, value in exponents.items() if value is not None)
        sys.stdout.write(f"{name:10} {said}   {powers}\n")
        sys.stdout.flush()
    record = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "note": options.note,
        "tiny": options.tiny,
        "axes": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(record, options.out.with_suffix(".png"))
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", type=choices(tuple(AXES)), default=list(AXES), help=",".join(AXES))
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test")
    parser.add_argument("--out", type=file_to_write, default=RESULT)
    parser.add_argument("--note", default="", help="kept with the result, e.g. what else the machine was doing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _in_process(axis: str, size: int, tiny: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", f"{axis}={size}", *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | WITHOUT_HOLES)
    if done.returncode:
        raise RuntimeError(f"{axis}={size} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The power of the size that the largest points follow; None where a cost is too small to have been seen."""
    last = list(zip(sizes, costs, strict=True))[-FITTED:]
    if any(cost <= 0 for _, cost in last):
        return None
    logs = np.log(np.array(last, dtype=np.float64))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def _plot(record: dict[str, Any], path: Path) -> None:
    """A panel an axis: seconds and memory against the size, both logarithmic, with their exponents."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    axes = record["axes"]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 6), layout="constrained", squeeze=False)
    for column, (name, axis) in enumerate(axes.items()):
        for row, (key, unit, colour) in enumerate((("cpu_s", "seconds of all cores", "C0"), ("peak_mib", "MiB", "C1"))):
            panel = panels[row][column]
            sizes = [point["size"] for point in axis["points"]]
            costs = [point[key] for point in axis["points"]]
            panel.loglog(sizes, [max(cost, 1e-3) for cost in costs], "o", color=colour)
            power, fitted = axis["exponents"][key], sizes[-FITTED:]
            if power is not None:  # through the middle of the points it is fitted to
                middle = np.exp(np.mean(np.log(fitted))), np.exp(np.mean(np.log(costs[-FITTED:])))
                panel.loglog(fitted, [middle[1] * (size / middle[0]) ** power for size in fitted], "--", color=colour)
            panel.set_xticks(sizes, [_short(size) for size in sizes])
            panel.xaxis.set_minor_locator(NullLocator())
            label = "too small to fit" if power is None else f"size^{power:.2f}"
            panel.set(title=f"{name}: {label}", xlabel=axis["title"], ylabel=unit if column == 0 else "")
            panel.grid(True, which="major", alpha=0.3)
    figure.suptitle(f"{record['cores']} cores; exponents of the {FITTED} largest sizes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(size: int) -> str:
    return f"{size / 1000:g}k" if size % 1000 == 0 else f"{size // 1024}Ki" if size % 1024 == 0 else str(size)


if __name__ == "__main__":
    raise SystemExit(main())
