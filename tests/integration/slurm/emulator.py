"""What of SLURM the package calls, on one machine and without daemons: sbatch, srun, squeue, scancel and scontrol requeue.

    python emulator.py PROGRAM ARGUMENTS...    (the folder $EMULATED_SLURM holds a folder a job)

Each job has a keeper, which waits for what the job depends on, starts its script, warns it before its time limit, and starts it
again when it was requeued, as slurmctld and slurmd do. There are two nodes in one partition, `main`, and room for every job.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

KILL_WAIT = 5.0
TICK = 0.05
NODES = 2
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def root() -> Path:
    return Path(os.environ["EMULATED_SLURM"])


def read(job: str) -> dict[str, Any]:
    return dict(json.loads((root() / job / "job.json").read_text()))


def change(job: str, **fields: Any) -> None:
    with FileLock(root() / job / ".lock"):
        path = root() / job / "job.json"
        written = path.with_suffix(".new")
        written.write_text(json.dumps(read(job) | fields if path.exists() else fields))
        written.replace(path)


def jobs() -> list[str]:
    return sorted((path.parent.name for path in root().glob("*/job.json")), key=int)


# ------------------------------------------------------------------------------------------------ the programs


def sbatch(words: list[str]) -> int:
    script = Path(words[-1]).read_text()
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = shlex.split(line)[1].removeprefix("--").partition("=")
            options[name] = value or "yes"
    if options.get("partition", "main") != "main":
        return refuse("sbatch: error: invalid partition specified: " + options["partition"])
    if "gpus-per-node" in options:
        return refuse("sbatch: error: Invalid generic resource (gres) specification")
    if int(options.get("nodes", 1)) > NODES:
        return refuse("sbatch: error: Batch job submission failed: Requested node configuration is not available")
    with FileLock(root() / ".lock"):
        job = str(len(jobs()) + 1)
        (root() / job).mkdir()
    (root() / job / "script").write_text(script)
    change(job, options=options, state="PENDING", restarts=0, folder=str(Path.cwd()), asked="")
    keeper = [sys.executable, __file__, "keep", job, str(root())]
    with (root() / job / "keeper.log").open("wb") as log:
        subprocess.Popen(
            keeper, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
        )
    sys.stdout.write(f"Submitted batch job {job}\n")
    return 0


def refuse(said: str) -> int:
    sys.stderr.write(f"{said}\n")
    return 1


def squeue(words: list[str]) -> int:
    asked = next(word for word in words if word.startswith("--jobs=")).removeprefix("--jobs=").split(",")
    for job in set(asked) & set(jobs()):
        sys.stdout.write(f"{job} {read(job)['state']}\n")
    return 0


def scancel(words: list[str]) -> int:
    for job in words:
        if read(job)["state"] not in OVER:
            change(job, asked="cancel")
    return 0


def scontrol(words: list[str]) -> int:
    assert words[0] == "requeue"
    change(words[1], asked="requeue")
    return 0


def srun(words: list[str]) -> int:
    """Run a task on each node, and end all when one ends badly."""
    job = read(os.environ["SLURM_JOB_ID"])
    options, command, output = [], [], ""
    while words and words[0].startswith("--"):
        options.append(words.pop(0))
        if options[-1] == "--output":
            output = words.pop(0)
    command, nodes = words, int(job["options"].get("nodes", 1))
    tasks = []
    for number in range(nodes):
        names = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
        path = output.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", str(number))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab") as log:
            tasks.append(subprocess.Popen(command, env={**os.environ, **names}, stdout=log, stderr=log))
    (root() / os.environ["SLURM_JOB_ID"] / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    bad = 0
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.returncode]
        if ended and "--kill-on-bad-exit=1" in options and not bad:
            bad = ended[0]
            for task in tasks:
                task.terminate()
        time.sleep(TICK)
    codes = [task.returncode for task in tasks if task.returncode]
    return abs(bad or (codes[0] if codes else 0))


# ------------------------------------------------------------------------------------------------ a job's keeper


def keep(words: list[str]) -> int:
    """Run a job through all its states."""
    job = words[0]
    while True:
        if not wait_for_others(job):
            return 0
        change(job, state="RUNNING", asked="")
        state = run_once(job)
        if state != "REQUEUED":
            change(job, state=state)
            return 0
        change(job, state="PENDING", asked="", restarts=read(job)["restarts"] + 1)


def wait_for_others(job: str) -> bool:
    """Wait until the job may start; False where it never will."""
    record = read(job)
    waits = [word for word in record["options"].get("dependency", "").split(",") if word]
    while True:
        if read(job)["asked"] == "cancel":
            change(job, state="CANCELLED")
            return False
        ready = True
        for wait in waits:
            kind, *others = wait.split(":")
            if kind == "singleton":
                others = [other for other in jobs() if int(other) < int(job)]
                names = {other: read(other)["options"]["job-name"] for other in others}
                others = [other for other, name in names.items() if name == record["options"]["job-name"]]
            states = [read(other)["state"] for other in others]
            ready = ready and all(state in OVER for state in states)
            if kind == "afterok" and any(state in OVER - {"COMPLETED"} for state in states):
                change(job, state="CANCELLED")  # --kill-on-invalid-dep
                return False
        if ready:
            return True
        time.sleep(TICK)


def run_once(job: str) -> str:
    record, folder = read(job), root() / job
    (folder / "tasks").unlink(missing_ok=True)
    names = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": record["options"].get("nodes", "1"),
        "SLURM_NTASKS": record["options"].get("nodes", "1"),
        "SLURM_RESTART_COUNT": str(record["restarts"]),
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    path = Path(record["options"]["output"].replace("%j", job))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        began = time.monotonic()
        script = ["bash", str(folder / "script")]
        process = subprocess.Popen(
            script, cwd=record["folder"], env={**os.environ, **names}, stdout=log, stderr=log, start_new_session=True
        )
    limit = 60 * int(record["options"].get("time", 60))
    warning = re.fullmatch(r"(\w+)@(\d+)", record["options"].get("signal", "USR2@0"))
    assert warning is not None
    warned = ended = 0.0
    reason = ""
    while process.poll() is None:
        now = time.monotonic()
        if not warned and now - began > limit - int(warning[2]):
            warned = now
            tell(job, getattr(signal, f"SIG{warning[1]}"))
        asked = read(job)["asked"] or ("timeout" if now - began > limit else "")
        if asked and not ended:
            ended, reason = now, asked
            tell(job, signal.SIGTERM)
        if ended and now - ended > KILL_WAIT:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(TICK)
    reason = reason or read(job)["asked"]
    states = {"cancel": "CANCELLED", "timeout": "TIMEOUT", "requeue": "REQUEUED"}
    return states.get(reason) or ("FAILED" if process.returncode else "COMPLETED")


def tell(job: str, number: int) -> None:
    """Send a signal to the job's tasks, as slurmd does: to all processes of each."""
    path = root() / job / "tasks"
    import psutil

    for pid in path.read_text().split() if path.exists() else []:
        try:
            task = psutil.Process(int(pid))
            for process in [task, *task.children(recursive=True)]:
                process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    programs = {one.__name__: one for one in (sbatch, squeue, scancel, scontrol, srun, keep)}
    sys.exit(programs[sys.argv[1]](sys.argv[2:]))
