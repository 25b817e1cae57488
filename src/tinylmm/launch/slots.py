"""How many stages run side by side, and on which devices. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from tinylmm.config.cores import usable_cores
from tinylmm.config.gpus import gpu_names
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.share import Share
from tinylmm.errors import UserError


class Slots:
    """Places for stages: each has GPUs of its own, or a share of the cores.

    Args:
        launches: of all runs; their stages take each other's places, so a place is large enough for any.

    Raises:
        UserError: there are GPUs, but fewer than so many places need.
    """

    def __init__(self, launches: Sequence[LaunchSpec]) -> None:
        ranks = max(launch.nproc for launch in launches)
        chosen = max((launch.slots for launch in launches if launch.slots != "auto"), default=None)
        gpus = [] if any(launch.device == "cpu" for launch in launches) else gpu_names()
        self.number = chosen or max(1, len(gpus) // ranks)
        if gpus and self.number > 1 and self.number * ranks > len(gpus):
            raise UserError(
                f"launch.slots is {self.number}, which with launch.nproc={ranks} needs {self.number * ranks} GPUs, and "
                f"{len(gpus)} can be seen. Set launch.slots={max(1, len(gpus) // ranks)}, or launch.device=cpu."
            )
        alone = self.number == 1
        self._free = [() if alone or not gpus else tuple(gpus[n * ranks : (n + 1) * ranks]) for n in range(self.number)]

    @property
    def side_by_side(self) -> bool:
        """Whether there is more than one place."""
        return self.number > 1

    @property
    def free(self) -> int:
        """Places that are free."""
        return len(self._free)

    def take(self, waiting: int) -> Share:
        """Take a place for a stage.

        Args:
            waiting: stages that could start beside it; cores are divided by those that will run, not by all places.
        """
        under_way = self.number - len(self._free)
        together = min(self.number, under_way + 1 + waiting)
        cores = max(1, usable_cores() // together) if self.side_by_side else 0
        return Share(self._free.pop(0), cores)

    def give_back(self, share: Share) -> None:
        """Free the place of a stage that has ended."""
        self._free.append(share.gpus)
