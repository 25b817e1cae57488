"""When a grid will be done, from how long its stages took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from tinylmm.planning.estimates import training_seconds
from tinylmm.planning.planner import RunPlan
from tinylmm.store.stage import Stage


class Estimate:
    """Seconds that stages take: the mean of those with the same kind and name, or else what is expected, or of the same kind.

    Args:
        expected: what is reckoned of a stage beforehand; None where nothing is.
    """

    def __init__(self, expected: Callable[[Stage], float | None] = lambda stage: None) -> None:
        self._seen: dict[tuple[str, ...], tuple[float, int]] = {}
        self._expect, self._expected = expected, dict[str, float | None]()

    def learn(self, stage: Stage, seconds: float) -> None:
        """Take in how long a stage took, now or when it was made."""
        for key in ((stage.kind, stage.name), (stage.kind,)):
            total, number = self._seen.get(key, (0.0, 0))
            self._seen[key] = (total + seconds, number + 1)

    def seconds(self, stage: Stage) -> float | None:
        """How long a stage will take, None while none of its kind has been seen and nothing is expected of it."""
        if (found := self._mean((stage.kind, stage.name))) is not None:
            return found
        if stage.digest not in self._expected:
            self._expected[stage.digest] = self._expect(stage)
        expected = self._expected[stage.digest]
        return self._mean((stage.kind,)) if expected is None else expected

    def _mean(self, key: tuple[str, ...]) -> float | None:
        total, number = self._seen.get(key, (0.0, 0))
        return total / number if number else None

    def left(
        self,
        stages: Iterable[Stage],
        elapsed: Mapping[str, float],
        slots: int,
        known: Mapping[str, float] = MappingProxyType({}),
    ) -> float | None:
        """Seconds until all of `stages` are done: those of their longest chain, or of all shared out over the slots.

        Args:
            stages: that are not done, parents first.
            elapsed: digest of a running stage -> seconds since it began.
            slots: stages that run side by side.
            known: digest of a running stage -> seconds that it says it has left.

        Returns:
            None while there is a kind of stage of which none has been seen.
        """
        ends: dict[str, float] = {}
        total = 0.0
        for stage in stages:
            takes = known.get(stage.digest)
            if takes is None:
                whole = self.seconds(stage)
                if whole is None:
                    return None
                takes = max(0.0, whole - elapsed.get(stage.digest, 0.0))
            total += takes
            ends[stage.digest] = takes + max((ends.get(parent, 0.0) for parent in stage.parents.values()), default=0.0)
        return max([total / slots, *ends.values()])


def expected_seconds(plan: RunPlan, stage: Stage) -> float | None:
    """What the planner reckons of a training; None of other kinds, of unknown parts, and where the device is not known."""
    if stage.kind != "train" or stage.name not in plan.run.recipe.stages:
        return None
    return training_seconds(plan, stage)


def clock(seconds: float) -> str:
    """Return `1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
