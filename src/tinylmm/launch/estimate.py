"""When a grid will be done, from how long its stages took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tinylmm.store.stage import Stage


class Estimate:
    """Seconds that stages take: the mean of those with the same kind and name, or else of the same kind."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], tuple[float, int]] = {}

    def learn(self, stage: Stage, seconds: float) -> None:
        """Take in how long a stage took, now or when it was made."""
        for key in ((stage.kind, stage.name), (stage.kind,)):
            total, number = self._seen.get(key, (0.0, 0))
            self._seen[key] = (total + seconds, number + 1)

    def seconds(self, stage: Stage) -> float | None:
        """How long a stage will take, None while none of its kind has been seen."""
        for key in ((stage.kind, stage.name), (stage.kind,)):
            if key in self._seen:
                total, number = self._seen[key]
                return total / number
        return None

    def left(self, stages: Iterable[Stage], elapsed: Mapping[str, float], slots: int) -> float | None:
        """Seconds until all of `stages` are done: those of their longest chain, or of all shared out over the slots.

        Args:
            stages: that are not done, parents first.
            elapsed: digest of a running stage -> seconds since it began.
            slots: stages that run side by side.

        Returns:
            None while there is a kind of stage of which none has been seen.
        """
        ends: dict[str, float] = {}
        total = 0.0
        for stage in stages:
            takes = self.seconds(stage)
            if takes is None:
                return None
            takes = max(0.0, takes - elapsed.get(stage.digest, 0.0))
            total += takes
            ends[stage.digest] = takes + max((ends.get(parent, 0.0) for parent in stage.parents.values()), default=0.0)
        return max([total / slots, *ends.values()])


def clock(seconds: float) -> str:
    """Return `1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
