"""Clusters for tests: SLURM itself, with two nodes on this machine, where that can run, and its emulation."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

EMULATOR = Path(__file__).with_name("emulator.py")
EMULATED = ("sbatch", "srun", "squeue", "scancel", "scontrol")
DAEMONS = ("munged", "slurmctld", "slurmd", "mungekey")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[2]}-{last}] CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


@contextmanager
def emulated(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of the emulated cluster."""
    programs, state = folder / "bin", folder / "state"
    for made in (programs, state):
        made.mkdir(parents=True)
    for name in EMULATED:
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {EMULATOR} {name} "$@"\n')
        path.chmod(0o755)
    yield {"PATH": f"{programs}:{os.environ['PATH']}", "EMULATED_SLURM": str(state)}
    _end_all_of(folder)


def why_not_real() -> str | None:
    """Why SLURM itself cannot run here; None where it can."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]:
        return f"no {', '.join(missing)} here (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@contextmanager
def real(folder: Path) -> Iterator[dict[str, str]]:
    """Start munge and SLURM on loopback, and yield the environment in which its programs find it."""
    for made in (folder, folder / "state"):
        made.mkdir(parents=True, exist_ok=True)
        made.chmod(0o755)
    ports = _free_ports(4)
    host = socket.gethostname()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder, ports=ports, last=ports[2] + 1))
    environment = {
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
        "SLURM_CONF": str(conf),
    }
    full = {**os.environ, **environment}
    key = folder / "munge.key"
    commands = [
        ["mungekey", "-c", "-k", str(key)],
        [
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            *(f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")),
        ],
        ["slurmctld"],
        ["slurmd", "-N", "n1"],
        ["slurmd", "-N", "n2"],
    ]
    try:
        for command in commands:
            subprocess.run(command, env=full, check=True, timeout=60)
        _wait_until_idle(full)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=full, check=False, timeout=60)
        _end_all_of(folder)
        for path in folder.glob("*.pid"):
            if (pid := path.read_text().strip()).isdigit() and psutil.pid_exists(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def _free_ports(number: int) -> list[int]:
    """Ports in a row."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        first = int(listening.getsockname()[1])
    first = first if first + number < 65536 else first - number
    return list(range(first, first + number))


def _wait_until_idle(environment: dict[str, str]) -> None:
    for _ in range(120):
        command = ["sinfo", "--noheader", "--format=%D %t", "--partition=main"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
        if said.split() == ["2", "idle"]:
            return
        time.sleep(0.5)
    raise TimeoutError(f"SLURM's nodes do not become idle: {said}")


def _end_all_of(folder: Path) -> None:
    """Kill what a test's jobs have left: all processes whose command names the test's folder, and their children."""
    for process in psutil.process_iter(["cmdline"]):
        if process.pid == os.getpid() or not any(str(folder.parent) in word for word in process.info["cmdline"] or ()):
            continue
        with suppress(psutil.NoSuchProcess):
            for one in [*process.children(recursive=True), process]:
                one.kill()
