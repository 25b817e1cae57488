"""Kills or signals tinylmm-train, gives the same command again, and compares with a run that nobody disturbed.

    python -m tests.integration.kill_harness FOLDER PLAN SEED

PLAN is a JSON list of trials: {"launch", "whom", "signal", "when", "real": bool, "readers": int}.

    launch   local (one process); torchrun, zero2, zero3 (two ranks)
    whom     parent, agent (torchrun), rank (one of them), all (each process of the run); starter where processes are real
    when     any (a random moment), training (behind a random step), save (while a checkpoint lies in the staging folder)
    real     every process is started anew by its command, as a user's is
    readers  processes a rank that read samples

Where a trial is not `real`, command, torchrun and ranks are forks of this process, which has the libraries imported: a second,
not ten. It is torchrun's own agent either way; only whose fork it is differs.

Prints one JSON object: how many trials hit their moment, and the faults found, a sentence each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from safetensors.torch import load_file

import tinylmm.stages.evaluate
import tinylmm.stages.prepare
import tinylmm.stages.train  # noqa: F401  (imported before the forks)
from tests.integration.project import Project, environment, tiny_project
from tinylmm.cli.errors import guarded
from tinylmm.cli.train import run
from tinylmm.launch import agent
from tinylmm.launch.backends import torchrun
from tinylmm.launch.worker import WORDS_FOLDER
from tinylmm.stop import held_back
from tinylmm.store.layout import LOG_FILE

FORKED = "tests.integration.kill_harness.ForkedTorchrun"
STAGING = "work/train-*/checkpoints/staging/checkpoint-*"
CHECKPOINTS = "work/train-*/checkpoints/checkpoint-*"
METRICS = "work/train-*/metrics.jsonl"
WORDS = ("launch.save_steps=1", "recipe.stages.finetune.epochs=2")
DISTURBED = "finetune"
"""The stage that trials disturb; those before it are taken over from the undisturbed run."""
SAVED = 75
PATIENCE = 120.0
"""Seconds that a trial may take to come to its moment, or to end."""
TRIES = 3
"""For a moment that did not come before the run had ended."""
REAL_START = 4.0
"""How much longer a run takes that has its libraries to import."""


@dataclass(frozen=True)
class Trial:
    """One disturbance; see the module."""

    launch: str
    whom: str
    signal: str
    when: str
    real: bool = False
    readers: int = 0


class Fork:
    """What is used here of `subprocess.Popen`, for a fork that calls a function."""

    def __init__(self, call: Callable[[], Any], outputs: dict[int, IO[Any] | int | None], new_session: bool) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            if new_session:
                os.setsid()
            for descriptor, output in outputs.items():
                if output is not None:
                    os.dup2(output if isinstance(output, int) else output.fileno(), descriptor)
            code = int(call() or 0)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", end)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkedAgent(Fork):
    """What is used of `starting.Started`."""

    def signal_children(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(self.pid).children():
                rank.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def starter_death(self) -> None:
        """There is no starter."""


class ForkedTorchrun(torchrun.Backend):
    """torchrun whose agent is a fork of the command, with nobody between."""

    def _spawn(self, folder: Path, meeting: list[str]) -> Any:
        words = [*meeting, f"--nproc-per-node={self._launch.nproc}", "--tee=2", f"--log-dir={folder / WORDS_FOLDER}"]
        words += ["--module", "tinylmm.launch.worker", str(folder)]
        parent = os.getpid()

        def become_agent() -> None:
            os.environ["OMP_NUM_THREADS"] = "1"
            agent.supervise(parent, folder, words, copies=True)

        with (folder / LOG_FILE).open("ab") as output, held_back():
            return ForkedAgent(become_agent, {1: output, 2: output}, new_session=True)


class Attempt:
    """The command, running.

    Args:
        words: after the project's own.
        real: start it as a user does.
    """

    def __init__(self, project: Project, words: list[str], real: bool) -> None:
        self.log = project.root / "attempts.log"
        with self.log.open("ab") as output:
            self.begin = output.tell()
            if real:
                self.process: Any = subprocess.Popen(
                    project.command(*words), cwd=project.root, env=environment(), stdout=output, stderr=output
                )
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                command = [*project.words, *words]
                os.chdir(project.root)
                self.process = Fork(lambda: guarded(lambda: run(command)), {1: output, 2: output}, new_session=True)

    def everyone(self) -> list[psutil.Process]:
        """Each process of it, the command first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def said(self) -> str:
        return self.log.read_bytes()[self.begin :].decode(errors="replace")


def victims(trial: Trial, attempt: Attempt, draw: random.Random) -> list[psutil.Process]:
    """Whom to hit; nobody where there is no such process at this moment."""
    everyone = attempt.everyone()
    by_depth: dict[str, list[psutil.Process]] = {"parent": everyone[:1], "agent": [], "rank": [], "all": everyone}
    with contextlib.suppress(psutil.NoSuchProcess):
        by_depth["agent"] = everyone[0].children()[:1] if everyone else []
        if trial.real:
            by_depth["starter"] = by_depth["agent"]
            by_depth["agent"] = [one for starter in by_depth["starter"] for one in starter.children()]
        by_depth["rank"] = [rank for one in by_depth["agent"] for rank in one.children()]
    found = by_depth[trial.whom]
    return [draw.choice(found)] if trial.whom == "rank" and found else found


def wait_for(trial: Trial, attempt: Attempt, store: Path, draw: random.Random, duration: float) -> bool:
    """Wait for the trial's moment; False if the command ended before it came."""
    if trial.when == "any":
        return _until(lambda: False, attempt, draw.uniform(0.05, 0.9 * duration))
    if trial.when == "training":
        steps = draw.randrange(1, 6)
        return _until(lambda: _rows(store) >= steps, attempt)
    seen: set[str] = set()
    skip = draw.randrange(4)

    def saving() -> bool:
        seen.update(glob(str(store / STAGING)))  # noqa: PTH207 (unlike Path.glob it bears folders that vanish)
        return len(seen) > skip and bool(glob(str(store / STAGING)))  # noqa: PTH207

    return _until(saving, attempt)


def _until(reached: Callable[[], bool], attempt: Attempt, seconds: float | None = None) -> bool:
    end = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while not reached():
        if time.monotonic() > end:
            return seconds is not None
        if attempt.process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def _rows(store: Path) -> int:
    return sum(Path(path).read_bytes().count(b"\n") for path in glob(str(store / METRICS)))  # noqa: PTH207


def disturb(trial: Trial, attempt: Attempt, store: Path, draw: random.Random) -> list[str]:
    """Hit the running command; return what was wrong with how it ended."""
    faults = []
    whole = attempt.everyone()
    for process in victims(trial, attempt, draw):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(getattr(signal, trial.signal))
    began = time.monotonic()
    code = attempt.process.wait(PATIENCE)
    took = time.monotonic() - began
    end = time.monotonic() + 1.0
    while (left := [one for one in whole if _alive(one)]) and time.monotonic() < end:
        time.sleep(0.01)
    if left:
        faults.append(f"{len(left)} of {len(whole)} processes are left after exit code {code}")
    if trial.signal != "SIGKILL" and code not in (SAVED, 0):
        faults.append(f"a signal ended in exit code {code}, not {SAVED}: {attempt.said()[-600:]}")
    checkpoints = list(store.glob(CHECKPOINTS))
    if trial.signal != "SIGKILL" and trial.when != "any" and code == SAVED and not checkpoints:
        faults.append("a signal was answered without a checkpoint")
    if took > 45:
        faults.append(f"it took {took:.0f} s to end")
    return faults


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def result(store: Path) -> dict[str, Any]:
    """What the trainings left: every tensor, and the record of losses by step."""
    found: dict[str, Any] = {}
    for stage in sorted(store.glob("stages/train-*")):
        name = json.loads((stage / "manifest.json").read_text())["name"]
        for path in (stage / "output/model").rglob("*.safetensors"):
            found |= {f"{name}/{path.parent.name}/{key}": value for key, value in load_file(path).items()}
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        found[f"{name}/losses"] = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    return found


def published(store: Path) -> dict[str, int]:
    """The newest checkpoint of each unfinished training, by the name of its folder."""
    newest: dict[str, int] = {}
    for path in store.glob(CHECKPOINTS):
        training = path.parents[1].name
        newest[training] = max(newest.get(training, 0), int(path.name.removeprefix("checkpoint-")))
    return newest


def lost(store: Path, saved: dict[str, int]) -> list[str]:
    """What was wrong with how trainings, finished now, went on from the newest checkpoints that they had left."""
    faults = []
    for training, step in saved.items():
        log = (store / "stages" / training / "log.txt").read_text(errors="replace")
        resumed = set(re.findall(r"resuming from \S*/checkpoint-(\d+)$", log, re.MULTILINE))
        if resumed != {str(step)}:
            faults.append(f"the checkpoint of step {step} was there, and these were continued: {sorted(resumed)}")
        if refused := re.search(r"checkpoint of step .* refused.*", log):
            faults.append(f"a checkpoint is damaged: {refused[0]}")
    return faults


def difference(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    if found.keys() != expected.keys():
        return [f"the result has other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"]
    return [
        f"{name} differs"
        for name, value in expected.items()
        if not (torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name])
    ]


def launch_words(launch: str, real: bool, readers: int = 0) -> list[str]:
    words = [*WORDS, f"launch={launch}", f"launch.num_workers={readers}"]
    if launch != "local":
        words += ["launch.nproc=2"] + ([] if real else [f"launch.backend={FORKED}", "trust=[tests]"])
    if launch == "zero3":
        words.append("launch.zero3_whole_below=0")  # else parameters this small are kept whole on every rank
    return words


def undisturbed(project: Project, store: Path, launch: str) -> tuple[float, dict[str, Any]]:
    """Run everything once, then leave in the store what comes before the stage to disturb; seconds it took, and the result."""
    words = [*launch_words(launch, False), f"store={store}"]
    attempt = Attempt(project, words, real=False)
    assert attempt.process.wait(PATIENCE) == 0, attempt.said()
    expected = result(store)
    for stage in store.glob("stages/train-*"):
        if json.loads((stage / "manifest.json").read_text())["name"] == DISTURBED:
            shutil.rmtree(stage)
    begun, began = shutil.copytree(store, store.with_name(f"timed-{launch}")), time.monotonic()
    attempt = Attempt(project, [*words, f"store={begun}"], real=False)
    assert attempt.process.wait(PATIENCE) == 0, attempt.said()
    assert not difference(result(begun), expected)
    return time.monotonic() - began, expected


def import_libraries() -> None:
    """Load what commands, agents and ranks will need, before they are forked."""
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401  (accelerate loads it in any training)

    gc.freeze()


def main() -> None:
    folder, seed = Path(sys.argv[1]).resolve(), int(sys.argv[3])
    trials = [Trial(**trial) for trial in json.loads(sys.argv[2])]
    import_libraries()
    project, draw = tiny_project(folder), random.Random(seed)
    expected, duration = {}, {}
    launches = sorted({trial.launch for trial in trials})
    for launch in launches:
        duration[launch], expected[launch] = undisturbed(project, folder / f"begun-{launch}", launch)
    hits, faults = 0, []
    for number, trial in enumerate(trials):
        store, wrong = folder / f"store-{number}", []
        words = [*launch_words(trial.launch, trial.real, trial.readers), f"store={store}"]
        lasts = duration[trial.launch] * (REAL_START if trial.real else 1)
        for _ in range(TRIES):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(folder / f"begun-{trial.launch}", store)
            attempt = Attempt(project, words, trial.real)
            if wait_for(trial, attempt, store, draw, lasts) and victims(trial, attempt, draw):
                hits += 1
                wrong += disturb(trial, attempt, store, draw)
                break
            attempt.process.wait(PATIENCE)  # it ended before its moment came: another try, and sooner
            lasts /= 2
        saved = published(store)
        again = Attempt(project, [*launch_words(trial.launch, False), f"store={store}"], real=False)
        if again.process.wait(PATIENCE) != 0:
            wrong.append(f"the same command again failed: {again.said()[-600:]}")
        else:
            wrong += lost(store, saved) + difference(result(store), expected[trial.launch])
        faults += [f"trial {number} {asdict(trial)}: {fault}" for fault in wrong]
        if not wrong:
            shutil.rmtree(store)
    sys.stdout.write(json.dumps({"trials": len(trials), "hits": hits, "faults": faults}) + "\n")


if __name__ == "__main__":
    main()
