"""What training and answering cost on one GPU, in at most eight minutes, with nothing but this repository.

    python -m benchmarks.gpu                                     # or: make gpu-check
    python -m benchmarks.gpu --sections steps,planner --llms tinyllama
    python -m benchmarks.gpu --device cpu --tiny                 # every code path, at a size for a test

Random weights at real shapes: SigLIP-so400m-384 with Phi-2, TinyLlama and Qwen2.5-0.5B. Sections:

    machine     what the card's products and copies reach
    steps       our train stage beside transformers' Llava and Trainer (TinyLLaVA Factory's setting), on the same samples
    generation  20 questions an image: one at a time, the engine, and the engine at batch 1 against batch 64, in bf16 and fp32
    trainer     the train stage from JPEG files, beside images that wait in memory
    kernels     where the time of an optimiser step goes, and how long the card is idle
    planner     what `tinylmm plan` predicts of memory and time, beside what was measured
    techniques  each technique off and on
    unchecked   transformers' Llava without gradient checkpointing

Each section is a process of its own with a time limit; the next one starts its interpreter meanwhile. Every row is written when
it is measured: what a section that fails or runs out of time has measured stands in benchmarks/results/gpu.json all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.arguments import choices, file_to_write

RESULT = Path(__file__).parent / "results" / "gpu.json"
LIMITS = {
    "machine": 45,
    "steps": 200,
    "generation": 70,
    "trainer": 35,
    "kernels": 35,
    "planner": 15,
    "techniques": 45,
    "unchecked": 25,
}
"""Section -> seconds after which it is ended, in the order in which they run; less than eight minutes together."""
NAMES = tuple(LIMITS)
LLMS = ("phi2", "tinyllama", "qwen2_5_0_5b")
PACKAGES = ("tinylmm", "torch", "transformers", "accelerate", "deepspeed", "flash-attn", "liger-kernel")
BUDGET = 470
"""Seconds for all sections together; eight minutes with the start."""
TINY_LIMIT = 600
"""Seconds for a section at tiny size: of a busy machine, nobody waits for a card."""
SAID = 2000
"""Characters that are kept of what a section that failed has said last."""
ROWS, GO = "rows.jsonl", b"go\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run the sections and write what they measured; 0 if all ended well, 1 if one did not."""
    options = _parse(words)
    if options.one:
        return _section(options)
    if not options.tiny and not _has_gpu():
        sys.stdout.write("no CUDA GPU was found, and nothing was measured; try --device cpu --tiny\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="tinylmm-gpu-") as folder:
        return _all(options, Path(folder))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", type=choices(NAMES), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--llms", type=choices(LLMS), default=list(LLMS), help=",".join(LLMS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes; a CPU has time for no others")
    parser.add_argument("--out", type=file_to_write, default=RESULT)
    parser.add_argument("--note", default="", help="kept with the result")
    parser.add_argument(
        "--here", action="store_true", help="run all in this process, one after the other, without limits"
    )
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu has time for --tiny alone; give both")
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------ one section


def _section(options: argparse.Namespace) -> int:
    """Import everything, wait for the word, measure."""
    from benchmarks.gpu_sections.sections import SECTIONS

    assert set(SECTIONS) == set(NAMES), "every section has a limit"
    if not options.here and sys.stdin.buffer.readline() != GO:
        return 1
    SECTIONS[options.one](_setting(options))
    return 0


def _setting(options: argparse.Namespace) -> Any:
    import torch

    from benchmarks.gpu_sections.setting import Setting

    file = options.folder / ROWS

    def emit(row: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())

    device = torch.device(options.device)
    return Setting(device, options.tiny, tuple(options.llms), options.folder, emit, _rows(options.folder))


def _rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / ROWS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


# ------------------------------------------------------------------------------------------------ all of them


def _all(options: argparse.Namespace, folder: Path) -> int:
    """Run the sections one after the other, and write the result after each."""
    record: dict[str, Any] = {**_where(options), "sections": {}, "rows": []}
    began, shown = time.perf_counter(), 0
    following = None if options.here else _start(options, options.sections[0], folder)
    for number, name in enumerate(options.sections):
        started = time.perf_counter()
        if options.here:
            outcome = _in_this_process(options, name, folder)
        else:
            process, following = following, None
            assert process is not None, "it was started while the one before ran"
            if number + 1 < len(options.sections):
                following = _start(options, options.sections[number + 1], folder)
            outcome = _await(options, name, process, folder, BUDGET - (started - began))
        record["sections"][name] = {"outcome": outcome, "seconds": round(time.perf_counter() - started, 1)}
        record["rows"] = _rows(folder)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for row in record["rows"][shown:]:
            sys.stdout.write(line_of(row) + "\n")
        shown = len(record["rows"])
        if outcome != "done":
            sys.stdout.write(f"{name:10} {outcome}\n")
        sys.stdout.flush()
    if record["rows"]:
        from benchmarks.gpu_sections.drawing import draw_results

        draw_results(record, options.out.with_suffix(".png"))
    return 0 if all(one["outcome"] == "done" for one in record["sections"].values()) else 1


def _where(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    on_gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "versions": found,
        "cores": os.cpu_count(),
        "tiny": options.tiny,
        "note": options.note,
    }


def _in_this_process(options: argparse.Namespace, name: str, folder: Path) -> str:
    from benchmarks.gpu_sections.sections import SECTIONS

    SECTIONS[name](_setting(argparse.Namespace(**vars(options) | {"folder": folder})))
    return "done"


def _start(options: argparse.Namespace, name: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that imports what a section needs, and waits for the word."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--one",
        name,
        "--folder",
        str(folder),
        "--device",
        options.device,
    ]
    command += ["--llms", ",".join(options.llms), *(["--tiny"] if options.tiny else [])]
    # What is measured of this machine is kept for the planner here, not in the user's cache.
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
        )


def _await(options: argparse.Namespace, name: str, process: subprocess.Popen[bytes], folder: Path, left: float) -> str:
    """Give the word, and wait as long as the section may take; returns how it ended."""
    limit = TINY_LIMIT if options.tiny else min(LIMITS[name], left)
    if limit <= 0:
        process.kill()
        process.wait()
        return "left out: no time was left"
    try:
        process.communicate(GO, timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended at its limit of {limit:.0f} s; what it had measured counts"
    if process.returncode == 0:
        return "done"
    said = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    return f"failed with exit code {process.returncode}:\n{said[-SAID:]}"


def line_of(row: dict[str, Any]) -> str:
    """A row for people."""
    words = [f"{row['section']:10}"]
    for key, value in row.items():
        if key == "section" or isinstance(value, dict | list) or value is None:
            continue
        words.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    return "  ".join(words)


if __name__ == "__main__":
    raise SystemExit(main())
