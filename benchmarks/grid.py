"""What a grid costs besides its stages: planning, scheduling, and what two slots are worth.

    python -m benchmarks.grid            # two or three minutes on a quiet machine
    python -m benchmarks.grid --only plan schedule

plan      a sweep of 200 runs, from its words to its plan
schedule  2,000 distinct stages of no cost in 200 runs, from plan to published results, through a backend that does nothing
slots     eight trainings of equal cost, one after another on one core and on all, against two side by side on one core each,
          in turn and each measured twice; what else runs on the machine is in the result as its load

Writes benchmarks/results/grid.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from tinylmm.config.compose import compose_all, compose_run
from tinylmm.config.identities import Recorded
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.spec import RunSpec
from tinylmm.launch.runner import execute
from tinylmm.planning.graph import StageGraph
from tinylmm.planning.kinds import KINDS, Kind
from tinylmm.planning.planner import RunPlan, plan_record, plan_runs
from tinylmm.stages.job import StageJob

RESULT = Path(__file__).parent / "results" / "grid.json"
RUNS = 200
CHAIN = 10
TRAININGS = 8
COUNTS = {"pretrain": 64, "share": 8, "finetune": 640, "text": 64, "test": 24}
SMALL = (
    "data=digits",
    *(f"{data}.build.options.{file}={n}" for data in ("data", "llm.build.data") for file, n in COUNTS.items()),
    "llm.init=random",
    "vision_tower.init=random",
    "eval=none",
    "llm.scale.tuning.epochs=1",
    "tracking.tensorboard=false",
)
"""The embedded experiment with parts that nobody trained: trainings of some five seconds."""


class NothingStage(Recorded):
    """Does nothing, under a number of its own."""

    number: int


KINDS["nothing"] = Kind(NothingStage, 1, "benchmarks.grid", uses_ranks=True)


class Nothing:
    """A launch backend for stages that are done when they are started."""

    def __init__(self, launch: LaunchSpec) -> None:
        pass

    def start(self, job: StageJob[NothingStage]) -> None:
        (job.output / "nothing").touch()

    def poll(self) -> dict[str, Any]:
        return {}

    def stop(self, now: bool = False) -> None:
        pass


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the result."""
    measures = {"plan": plan, "schedule": schedule, "slots": slots}
    parser = argparse.ArgumentParser(prog="benchmarks.grid")
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(words)
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            load = os.getloadavg()[0]
            record[name] = measures[name](Path(folder)) | {"load_before": round(load, 2), "cores": os.cpu_count()}
        sys.stdout.write(f"{name}: {json.dumps(record[name])}\n")
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def plan(folder: Path) -> dict[str, Any]:
    """Seconds from the words of a sweep to its plan."""
    clock, cpu = time.monotonic(), time.process_time()
    words = [f"seed=range(0,{RUNS // 4})", "recipe=base,share", "connector=mlp,linear", f"store={folder / 'store'}"]
    plans = _planned(words)
    totals = plan_record(plans)["totals"]
    return {
        "runs": totals["runs"],
        "stages": sum(totals["distinct"].values()),
        "seconds": round(time.monotonic() - clock, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def schedule(folder: Path) -> dict[str, Any]:
    """Stages a second, and memory after a tenth of them and after all."""
    compose_run([])  # what is imported on the way counts as none of the stages' memory
    tenth, few = _scheduled(folder / "few", RUNS // 10)
    cpu = time.process_time()
    seconds, all_mib = _scheduled(folder / "all", RUNS)
    return {
        "stages": RUNS * CHAIN,
        "stages_per_second": round(RUNS * CHAIN / seconds, 1),
        "cpu_ms_per_stage": round((time.process_time() - cpu) / (RUNS * CHAIN) * 1000, 2),
        "seconds_of_a_tenth": round(tenth, 2),
        "peak_rss_mib_of_a_tenth": few,
        "peak_rss_mib": all_mib,
    }


def _scheduled(folder: Path, runs: int) -> tuple[float, float]:
    launch = {"backend": "benchmarks.grid.Nothing", "slots": 4, "device": "cpu"}
    base = compose_run([f"store={folder}", "trust=[benchmarks]"])
    spec = base.model_copy(update={"launch": LaunchSpec.model_validate(launch)})
    plans = [_chain(spec, number) for number in range(runs)]
    clock = time.monotonic()
    outcomes = execute(plans, Console(file=io.StringIO()))
    seconds = time.monotonic() - clock
    assert all(outcome.exit_code == 0 for outcome in outcomes)
    assert len(list((folder / "stages").iterdir())) == runs * CHAIN
    return seconds, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _chain(spec: RunSpec, number: int) -> RunPlan:
    """A run of stages, each after the one before."""
    graph, parents = StageGraph(), {}
    for place in range(CHAIN):
        stage = graph.add("nothing", f"nothing {place}", {"number": number * CHAIN + place}, parents, {})
        parents = {"before": stage.digest}
    return RunPlan(f"run-{number}", [], spec, graph)


def slots(folder: Path) -> dict[str, Any]:
    """How much sooner two slots of a core each are done with trainings of equal cost than one slot of one core, or of all.

    A training that has several cores uses them, if not fully: over one slot that has all, two gain what that leaves idle.
    """
    rates = ",".join(f"{number}e-4" for number in range(1, TRAININGS + 1))
    begun = folder / "begun"
    for number in (1, 2):  # what the trainings share, and the imports of either way
        _run(begun, ["recipe.stages.finetune.lr=0.5e-4", "recipe.stages.finetune.max_steps=1", *SMALL], number)
    import torch  # here: what schedules has none, and its memory is measured

    cores = torch.get_num_threads()
    ways = {"one_slot_on_one_core": (1, 1), "one_slot_on_all_cores": (1, cores), "two_slots": (2, cores)}
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(2):
        for way, (number, threads) in ways.items():
            store = folder / "measured"
            shutil.copytree(begun, store)
            torch.set_num_threads(threads)
            clock, cpu = time.monotonic(), _cpu_seconds()
            _run(store, [f"recipe.stages.finetune.lr={rates}", *SMALL], number)
            took[way].append((round(time.monotonic() - clock, 2), round(_cpu_seconds() - cpu, 2)))
            shutil.rmtree(store)
    best = {way: min(seconds for seconds, _ in pairs) for way, pairs in took.items()}
    return {
        "trainings": TRAININGS,
        "seconds_and_cpu": took,
        "speedup_over_one_core": round(best["one_slot_on_one_core"] / best["two_slots"], 2),
        "speedup_over_all_cores": round(best["one_slot_on_all_cores"] / best["two_slots"], 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _cpu_seconds() -> float:
    """CPU time of this process, of the starter, and of the stages that the starter has seen the end of."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(t.user + t.system + t.children_user + t.children_system for t in times)


def _run(store: Path, words: list[str], number: int) -> None:
    outcomes = execute(_planned([*words, f"store={store}", f"launch.slots={number}"]), Console(file=io.StringIO()))
    assert all(outcome.exit_code == 0 for outcome in outcomes), [outcome.error for outcome in outcomes]


def _planned(words: list[str]) -> list[RunPlan]:
    plans = []
    for given, found in plan_runs(compose_all(words, multirun=True)):
        if not isinstance(found, RunPlan):
            raise found
        plans.append(replace(found, overrides=given))
    return plans


if __name__ == "__main__":
    sys.exit(main())
