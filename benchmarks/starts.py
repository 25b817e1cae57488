"""What starting torchrun's ranks costs a run of short stages: forks of a process that has all loaded against new processes.

    python -m benchmarks.starts            # several minutes

A sweep of one pretraining and four finetunings of one step each, on two ranks, as a user gives it, with the data prepared:
seconds of the command, and of each training. Both ways in turns; what else runs on the machine is in the result as its load.
`new` starts torchrun and each rank as new processes, which all load the libraries.

Writes benchmarks/results/starts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid import SMALL
from tinylmm.launch.backends import torchrun
from tinylmm.launch.starting import Started, start_torchrun
from tinylmm.launch.worker import WORDS_FOLDER

RESULT = Path(__file__).parent / "results" / "starts.json"
RATES = ("1e-4", "2e-4", "3e-4", "4e-4")
WORDS = (
    *SMALL,
    f"recipe.stages.finetune.lr={','.join(RATES)}",
    *(f"recipe.stages.{stage}.max_steps=1" for stage in ("pretrain", "finetune")),
    "launch.nproc=2",
    "launch.device=cpu",
)
WAYS = {"forked": (), "new": ("launch.backend=benchmarks.starts.New", "trust=[benchmarks]")}


class New(torchrun.Backend):
    """torchrun as a new process for each stage, whose ranks are new processes too."""

    def _spawn(self, folder: Path, meeting: list[str]) -> Started:
        words = [*meeting, f"--nproc-per-node={self._launch.nproc}", "--tee=2", f"--log-dir={folder / WORDS_FOLDER}"]
        words += ["--module", "tinylmm.launch.worker", str(folder)]
        own = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "STAGE": str(folder)}
        return start_torchrun(folder, "anew", own, words)  # variables of its own: a starter of its own


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(prog="benchmarks.starts")
    parser.add_argument("--launches", nargs="+", default=["torchrun", "zero2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(words)
    record: dict[str, Any] = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    for launch in options.launches:
        with tempfile.TemporaryDirectory() as folder:
            record[launch] = measure(launch, options.rounds, Path(folder))
        sys.stdout.write(f"{launch}: {json.dumps(record[launch])}\n")
    record["load_after"] = round(os.getloadavg()[0], 2)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(launch: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of the whole command, and of its first training and the later ones, by way."""
    begun = folder / "begun"
    _command(
        begun, [f"launch={launch}", "launch.backend=torchrun"]
    )  # what no way is to pay for: data, and what is compiled once
    for stage in begun.glob("stages/train-*"):
        if json.loads((stage / "manifest.json").read_text())["name"] in ("pretrain", "finetune"):
            shutil.rmtree(stage)
    took: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, more in WAYS.items():
            store = folder / "measured"
            shutil.copytree(begun, store)
            clock = time.monotonic()
            _command(store, [f"launch={launch}", *more])
            seconds = round(time.monotonic() - clock, 2)
            took[way].append({"command": seconds, "trainings": _trainings(store)})
            shutil.rmtree(store)
    later = {way: [one for run in runs for one in run["trainings"][1:]] for way, runs in took.items()}
    of_all = {way: [run["command"] for run in runs] for way, runs in took.items()}
    return {
        "runs": took,
        "command_seconds": {way: statistics.median(seconds) for way, seconds in of_all.items()},
        "later_training_seconds": {way: round(statistics.median(seconds), 2) for way, seconds in later.items()},
        "command_ratio": round(statistics.median(of_all["new"]) / statistics.median(of_all["forked"]), 2),
        "later_training_ratio": round(statistics.median(later["new"]) / statistics.median(later["forked"]), 2),
    }


def _command(store: Path, words: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tinylmm.cli.train", "-m", *WORDS, f"store={store}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _trainings(store: Path) -> list[float]:
    """Seconds of the trainings of a model, in the order in which they were done."""
    manifests = [json.loads(path.read_text()) for path in store.glob("stages/train-*/manifest.json")]
    found = [one for one in manifests if one["name"] in ("pretrain", "finetune")]
    assert len(found) == 1 + len(RATES), sorted(one["name"] for one in manifests)
    return [round(float(one["seconds"]), 2) for one in sorted(found, key=lambda one: str(one["finished"]))]


if __name__ == "__main__":
    sys.exit(main())
