"""Hold what `tinylmm plan` predicts of memory against what a training step takes, on a CPU at mid-size.

    python -m benchmarks.planner

Every case runs in a process of its own: random weights, two optimiser steps, peak resident memory over what was there before
the model was built. FLOPs are held to PyTorch's own count by tests/unit/sizing/test_flops.py. Writes
benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.builders import build, tuning
from tinylmm.config.groups import conf_folder
from tinylmm.config.recipe import TuneSpec
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.models.speed import speed_up
from tinylmm.models.tuning import enable_checkpointing
from tinylmm.sizing.connectors import connector_part
from tinylmm.sizing.llms import llm_part
from tinylmm.sizing.memory import MicroBatch, Placement, step_memory
from tinylmm.sizing.towers import TowerOutputShape, tower_part

RESULT = Path(__file__).parent / "results" / "planner.json"
STEPS = 2
LLMS = (
    "tinyllama",
    "phi2",
    "stablelm2",
    "qwen2_0_5b",
    "qwen3_0_6b",
    "gemma",
    "gemma2_2b",
    "gemma3_270m",
    "openelm_270m",
)
WITHOUT_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""The C library gives every tensor's memory back at once, as if it were counted: what it would keep is not the model's."""
TUNES: dict[str, dict[str, Any]] = {
    "pretrain": {"llm": "frozen", "vision_tower": "frozen", "connector": "full"},
    "finetune": {"llm": "full", "vision_tower": "frozen", "connector": "full"},
    "share": {"llm": "full", "vision_tower": {"from_layer": 0.5}, "connector": "full"},
    "lora": {"llm": {"lora": {"r": 16, "alpha": 32, "dropout": 0.0}}, "vision_tower": "frozen", "connector": "full"},
}
ROWS, TEXT, SUPERVISED = 2, 448, 128


def spec_of(llm: str, tower: str = "siglip", connector: str = "mlp") -> dict[str, Any]:
    """Parts of conf, the LLM of about 30 million parameters in its blocks and the tower half as wide."""
    language, vision, joined = (
        yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
        for group, name in (("llm", llm), ("vision_tower", tower), ("connector", connector))
    )
    small: dict[str, Any] = language["architecture"]
    if "model_dim" in small:
        small |= {"model_dim": 640, "num_transformer_layers": 6}
    else:
        grouped = small["num_key_value_heads"] != small["num_attention_heads"]
        small |= {"hidden_size": 640, "intermediate_size": 1664, "num_hidden_layers": 6, "num_attention_heads": 8}
        small["num_key_value_heads"] = 2 if grouped else 8
        small |= {"head_dim": 64} if "head_dim" in small else {}
    small |= {"vocab_size": 8192, "bos_token_id": 1, "eos_token_id": 2}
    small |= {"pad_token_id": 0} if "pad_token_id" in small else {}
    vision["architecture"] |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    vision["architecture"] |= {"num_attention_heads": 4, "image_size": 224}
    vision["image"] |= {"size": 224}
    output = {"select_layer": -2, "select": "patch", "drop_first_token": False, "options": {}}
    return {
        "llm": {"_target_": language["_target_"], "init": "random", "architecture": small},
        "vision_tower": vision | {"init": "random"},
        "tower_output": output,
        "connector": joined,
    }


def predict(spec: dict[str, Any], tune: dict[str, Any], accumulation: int, checkpointing: bool) -> Any:
    """What the planner says of a case."""
    tower, llm = spec["vision_tower"], spec["llm"]
    shape = TowerOutputShape(tower["image"]["size"], -2, "patch", False)
    seen = tower_part(tower["_target_"], tower["encoder"], tower["architecture"], shape)
    language = llm_part(llm["_target_"], llm["architecture"])
    options = spec["connector"].get("options", {})
    joined = connector_part(spec["connector"]["_target_"], options, seen.width, seen.tokens, language.width, False)
    how = TuneSpec.model_validate(tune).model_dump(mode="json", exclude_none=True)
    row = joined.tokens + TEXT
    batch = MicroBatch(ROWS * row, row, ROWS * SUPERVISED, ROWS, ROWS, 3 * 224 * 224, masked=True)
    placed = Placement(compute_bytes=4, on_gpu=False, accumulates=accumulation > 1, checkpointing=checkpointing)
    return step_memory({"vision_tower": seen, "connector": joined, "llm": language}, how, batch, placed)


def measure(spec: dict[str, Any], tune: dict[str, Any], accumulation: int, checkpointing: bool) -> float:
    """Bytes at the peak of a few steps, over what the process had before: a first step of one small row loads the code."""
    _steps(spec, tune, 1, checkpointing, rows=1, steps=1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    _steps(spec, tune, accumulation, checkpointing, rows=ROWS, steps=STEPS)
    return _status("VmHWM") - before


def _steps(
    spec: dict[str, Any], tune: dict[str, Any], accumulation: int, checkpointing: bool, rows: int, steps: int
) -> None:
    """Build the model, train it for some steps as the Trainer does, and forget it."""
    torch.manual_seed(0)
    model = build(spec).train()
    tuning(model, tune)
    speed_up(model, torch.device("cpu"))
    if checkpointing:
        enable_checkpointing(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    row = model.image_tokens + TEXT
    ids = torch.randint(3, 8000, (rows, row))
    ids[:, 1 : 1 + model.image_tokens] = IMAGE_TOKEN_ID
    positions = torch.arange(row).repeat(rows, 1)
    positions[:, -TEXT // 2 :] -= row - TEXT // 2  # a second sample in each row, so that a mask is needed
    targets = torch.full_like(ids, -100)
    targets[:, -SUPERVISED:] = 7
    for _ in range(steps):
        for _ in range(accumulation):
            pixels = torch.randn(rows, 3, 224, 224)
            model(ids, positions, targets, pixel_values=pixels).loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _status(key: str) -> float:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * float(next(line for line in lines if line.startswith(key)).split()[1])


def cases() -> dict[str, tuple[str, str, int, bool]]:
    """Name -> LLM, tuning, micro-batches a step, checkpointing."""
    found = {f"{llm} {tune}": (llm, tune, 1, False) for llm in LLMS for tune in ("pretrain", "finetune")}
    found |= {f"tinyllama {tune}": ("tinyllama", tune, 1, False) for tune in ("share", "lora")}
    found["tinyllama finetune, accumulated"] = ("tinyllama", "finetune", 2, False)
    found["tinyllama finetune, checkpointed"] = ("tinyllama", "finetune", 1, True)
    return found


def main() -> int:
    """Measure every case, or the one that is named; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="measure this one and print its bytes")
    chosen = parser.parse_args().case
    if chosen is not None:
        llm, tune, accumulation, checkpointing = cases()[chosen]
        sys.stdout.write(f"{measure(spec_of(llm), TUNES[tune], accumulation, checkpointing)}\n")
        return 0
    rows = {}
    for name, (llm, tune, accumulation, checkpointing) in cases().items():
        command = [sys.executable, "-m", "benchmarks.planner", "--case", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | WITHOUT_HOLES)
        measured = float(done.stdout)
        found = predict(spec_of(llm), TUNES[tune], accumulation, checkpointing)
        rows[name] = {"measured_mib": measured / 2**20, "predicted_mib": found.total / 2**20}
        rows[name]["ratio"] = found.total / measured
        terms = {k: round(v / 2**20) for k, v in vars(found).items() if v}
        sys.stdout.write(f"{name:36} {measured / 2**20:8.0f} MiB  predicted {rows[name]['ratio']:.2f} of it  {terms}\n")
        sys.stdout.flush()
    record = {"torch": torch.__version__, "device": "cpu", "rows": ROWS, "text_tokens": TEXT, "cases": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
