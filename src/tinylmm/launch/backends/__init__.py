"""Where stages run: one module a backend, named as in `launch.backend`, with a class `Backend`.

A backend starts a stage's job and says how it goes; claims, the store and the run's record are the runner's.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from tinylmm.config.launch import LaunchSpec
from tinylmm.config.targets import backend_target, resolve_target
from tinylmm.stages.job import StageJob


class LaunchBackend(Protocol):
    """Runs one stage; made anew for each."""

    def start(self, job: StageJob[Any]) -> None:
        """Begin the stage. A backend that works in this process may return only when the stage is done."""

    def poll(self) -> dict[str, Any] | None:
        """Return the stage's summary when it is done, None while it works.

        Raises:
            TinyLMMError: the stage failed; the message says why.
            StoppedError: it saved and stopped, as `stop` asked.
        """

    def stop(self, now: bool = False) -> None:
        """Ask the stage to save and stop, or end it at once. Any number of times, also when it has ended."""


def make_backend(
    launch: LaunchSpec, uses_ranks: bool, trust: tuple[str, ...] = (), side_by_side: bool = False
) -> LaunchBackend:
    """Return the backend that `launch` names; stages that use one process run in this one, or in one of their own.

    Args:
        uses_ranks: whether the stage's kind runs on every rank of the launch.
        trust: packages besides ours that a backend may come from.
        side_by_side: whether other stages run meanwhile, so that this process must not be the stage's.

    Raises:
        ConfigError: there is no such backend.
    """
    name = launch.backend if uses_ranks else "local"
    name = "process" if side_by_side and name == "local" else name
    backend = resolve_target(backend_target(name), trust, role="backend")
    return cast(LaunchBackend, backend(launch))
