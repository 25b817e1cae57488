"""Several machines on one stage: whoever claims it says where the others find it, and they join with ranks of their own.

All are given the same command and share the store. Only the one with the claim publishes; when a stage has no use for ranks the
others wait for it, as for any stage that another process works on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinylmm.config.cores import usable_cores
from tinylmm.config.launch import LaunchSpec
from tinylmm.errors import StageFailedError, StoppedError, UserError
from tinylmm.launch.starting import Started, start_torchrun
from tinylmm.launch.worker import WORDS_FOLDER, has_gpu_driver
from tinylmm.stages.job import StageJob
from tinylmm.stop import STOP_FILE
from tinylmm.store.claims import Owner, describe
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import LOG_FILE
from tinylmm.store.store import Store

log = logging.getLogger(__name__)

MEETING_FILE = "meeting.json"
"""In the work folder of a stage that is on several machines."""


@dataclass(frozen=True)
class Meeting:
    """Where the machines of one try at a stage find each other.

    Attributes:
        endpoint: HOST:PORT.
        token: of the claim under which the stage is worked on, and so of this try alone.
    """

    endpoint: str
    token: str
    nodes: int
    patience_s: int

    def words(self) -> list[str]:
        """For torchrun."""
        return [
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.token}",
            f"--rdzv-conf=join_timeout={self.patience_s},last_call_timeout=1",
        ]


def call_others(job: StageJob[Any], launch: LaunchSpec) -> Meeting:
    """Say in the stage's folder where the other machines find this one."""
    endpoint = launch.rendezvous or f"{socket.gethostname()}:{_free_port()}"
    meeting = Meeting(endpoint, job.claim, launch.nodes, launch.start_timeout_s)
    write_atomic(job.folder / MEETING_FILE, json.dumps(asdict(meeting)), durable=False)
    return meeting


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


class Joined:
    """The stages of other machines that this one works on too."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._agents: dict[str, tuple[Meeting, Path, Started]] = {}
        """Key of a stage -> where we met, its work folder, and our agent."""
        self._met: dict[str, tuple[str, str]] = {}
        """Key of a stage that this machine has joined -> the token of that try, which it joins once, and who led it."""

    @property
    def busy(self) -> bool:
        """Whether there are any."""
        return bool(self._agents)

    def join(self, key: str, owner: Owner, launch: LaunchSpec) -> None:
        """Join a stage that another process has claimed, if that waits for machines.

        Raises:
            UserError: this machine has fewer GPUs than ranks.
        """
        folder = self._store.layout.work_on(key)
        path = folder / MEETING_FILE
        if launch.nodes == 1 or not path.exists():
            return
        meeting = Meeting(**json.loads(path.read_text(encoding="utf-8")))
        if meeting.token != owner.token or self._met.get(key, ("", ""))[0] == meeting.token:
            return
        self._met[key] = (meeting.token, describe(owner))
        log.info("joining %s, which is led by %s", key, describe(owner))
        self._agents[key] = (meeting, folder, start_agent(folder, launch, meeting.words()))

    def refuse_to_lead(self, key: str) -> None:
        """Leave a stage alone that has ended without a result where it was led: the others will not come again.

        Raises:
            StoppedError: it was asked to stop.
            StageFailedError: it failed.
        """
        if key not in self._met:
            return
        folder, leader = self._store.layout.work_on(key), self._met[key][1]
        if (folder / STOP_FILE).exists():
            raise StoppedError(f"{key} was stopped with all its machines; the same command on each continues")
        raise StageFailedError(
            f"{key} has failed; it was led by {leader}, which says why. The log is {folder / LOG_FILE}."
        )

    def poll(self) -> None:
        """Let go of what has ended, and end what its leader has given up."""
        for key, (meeting, folder, agent) in list(self._agents.items()):
            if agent.poll() is None:
                if not (folder / MEETING_FILE).exists() or _token(folder / MEETING_FILE) != meeting.token:
                    agent.kill()
                continue
            del self._agents[key]

    def stop(self, now: bool = False) -> None:
        """Ask for all of them, on every machine, that they save and stop; or end our part at once."""
        for _, folder, agent in self._agents.values():
            if now:
                agent.kill()
            else:
                ask_to_stop(folder, agent)


def _token(path: Path) -> str:
    return str(json.loads(path.read_text(encoding="utf-8"))["token"])


def start_agent(folder: Path, launch: LaunchSpec, meeting: list[str]) -> Started:
    """Start this machine's torchrun (`launch/agent.py`) on the job in `folder`, in a session of its own.

    Args:
        meeting: torchrun's words for where it meets others, or that it is alone.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    _refuse_more_ranks_than_gpus(launch)
    words = [*meeting, f"--nproc-per-node={launch.nproc}", f"--log-dir={folder / WORDS_FOLDER}", "--tee=2"]
    words += ["--module", "tinylmm.launch.worker", str(folder)]
    (folder / LOG_FILE).touch()  # where that cannot be written it is said here and now
    on_cpu = launch.device == "cpu" or not has_gpu_driver()
    return start_torchrun(folder, "fork" if on_cpu else "try", _environment(launch), words)


def ask_to_stop(folder: Path, agent: Started) -> None:
    """Ask the ranks to save and stop, by a file that those of every machine see, and by a signal that wakes ours."""
    (folder / STOP_FILE).touch()
    agent.signal_children(signal.SIGTERM)


def _refuse_more_ranks_than_gpus(launch: LaunchSpec) -> None:
    """Say before anything starts what NCCL would say after half a minute as an invalid device ordinal.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    if launch.device == "cpu" or not has_gpu_driver():
        return
    import torch

    found = torch.cuda.device_count()
    if 0 < found < launch.nproc:
        raise UserError(
            f"launch.nproc is {launch.nproc}, but only {found} CUDA GPUs can be seen, and each rank needs its own. "
            f"Set launch.nproc={found}, or launch.device=cpu."
        )


def _environment(launch: LaunchSpec) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // launch.nproc)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if launch.device == "cpu" or not has_gpu_driver():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
