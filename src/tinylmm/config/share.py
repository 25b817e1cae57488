"""A stage's share of this machine, where several stages run side by side. No torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from tinylmm.config.cores import CORES


@dataclass(frozen=True)
class Share:
    """What one stage may use.

    Attributes:
        gpus: entries of CUDA_VISIBLE_DEVICES; empty for all that are visible.
        cores: CPU cores, of all its ranks together; 0 for all.
    """

    gpus: tuple[str, ...] = ()
    cores: int = 0

    def take(self, ranks: int = 1, environment: MutableMapping[str, str] = os.environ) -> int | None:
        """Let this process see its share and no more: to be called before CUDA and OpenMP start.

        Args:
            ranks: processes that share it.
            environment: of this process.

        Returns:
            The threads that a rank may compute with, None where nothing limits them.
        """
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        if not self.cores:
            return None
        environment[CORES] = str(self.cores)
        threads = max(1, self.cores // ranks)
        asked = environment.get("OMP_NUM_THREADS", "")
        threads = min(threads, int(asked)) if asked.isdecimal() and int(asked) else threads
        environment["OMP_NUM_THREADS"] = str(threads)
        return threads


WHOLE = Share()
"""The whole machine."""
