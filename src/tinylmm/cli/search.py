"""`tinylmm-train -m hydra/sweeper=optuna ...`: a sweeper of Hydra asks for runs, learns how good each is, and asks for others.

It asks for them in batches, and each batch is one grid: stages that its runs share are done once, and what the store has of
earlier batches is reused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tinylmm.config.compose import compose_all
from tinylmm.config.overrides import is_sweep
from tinylmm.config.spec import RunSpec
from tinylmm.errors import StoppedError, TinyLMMError, UserError
from tinylmm.launch.ledger import RunOutcome
from tinylmm.reports.collect import collect_report
from tinylmm.reports.tables import result_rows

OBJECTIVE = "objective="
CarryOut = Callable[[Sequence[tuple[list[str], RunSpec]]], list[RunOutcome]]


def search(words: Sequence[str], carry_out: CarryOut, console: Console) -> list[RunOutcome]:
    """Let the sweeper ask for runs until it has had enough; returns how each ended.

    Args:
        words: of the command line; `hydra...` is the sweeper's, `objective=EVALUATION[/METRIC]` says what it shall raise.
        carry_out: plans and runs a grid.
        console: where the best run is named.

    Raises:
        UserError: the sweeper is not installed, or a word of its own is wrong.
        StoppedError: a run was stopped, and the search with it.
    """
    own = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    objective = next((word.removeprefix(OBJECTIVE) for word in reversed(words) if word.startswith(OBJECTIVE)), "")
    rest = [word for word in words if word not in own and not word.startswith(OBJECTIVE)]
    swept = [word for word in rest if is_sweep(word)]
    if not swept:
        raise UserError(
            "-m hydra/sweeper=...: nothing to search over. Give at least one key several values: a=1,2, a=interval(0,1) "
            "or a=range(1,9)."
        )
    fixed = [word for word in rest if word not in swept]
    (_, first), *_ = compose_all(fixed, False)
    if not first.eval or (asked := objective.partition("/")[0]) not in ("", *first.eval):
        said = (
            f"{OBJECTIVE}{asked}: is no evaluation of these runs"
            if first.eval
            else "eval=none leaves nothing to search by"
        )
        raise UserError(f"{said}. Evaluations: {', '.join(first.eval) or 'none'}.")
    config = _sweeper_config(own)
    folder = first.store / "searches" / f"{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    OmegaConf.update(config, "hydra.sweep.dir", str(folder), force_add=True)
    launcher = _Launcher(fixed, objective, carry_out)
    try:
        sweeper = instantiate(config.hydra.sweeper)
        worker = getattr(sweeper, "sweeper", sweeper)  # a plugin's own class holds what works
        worker.config, worker.hydra_context, worker.launcher = config, object(), launcher
        worker.job_idx, worker.sweep_dir = 0, str(folder)
        sweeper.sweep(swept)
    except (HydraException, ValueError, NotImplementedError) as error:
        if launcher.working:  # not the sweeper's: a fault of ours is no wrong word
            raise
        raise UserError(f"-m hydra/sweeper=...: {str(error).splitlines()[0]}") from error
    if best := launcher.best(OmegaConf.select(config, "hydra.sweeper.direction")):
        value, name, varied = best
        console.print(f"best of {len(launcher.found)}: {value:.4g} ({name})  {' '.join(varied)}", highlight=False)
    console.print(f"search   {folder / 'optimization_results.yaml'}", highlight=False, soft_wrap=True)
    return launcher.outcomes


def _sweeper_config(words: Sequence[str]) -> DictConfig:
    """Compose the `hydra` node with the sweeper's own words.

    Raises:
        UserError: there is no such sweeper, or it has no such key.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("tinylmm.conf", version_base="1.3"):
            return compose("train", list(words), return_hydra_config=True)
    except HydraException as error:
        said = str(error).splitlines()[0]
        hint = (
            " hydra/sweeper=optuna needs the extra `sweep`: pip install 'tinylmm[sweep]'." if "optuna" in said else ""
        )
        raise UserError(f"{' '.join(words)}: {said}{hint}") from error


class _Launcher:
    """Stands where Hydra has a launcher: runs each batch as one grid.

    Attributes:
        found: value of the objective, run and varied words of each run that has one.
        working: whether a batch is under way.
    """

    def __init__(self, fixed: list[str], objective: str, carry_out: CarryOut) -> None:
        self.fixed, self.carry_out = fixed, carry_out
        self.evaluation, _, self.metric = objective.partition("/")
        self.outcomes: list[RunOutcome] = []
        self.found: list[tuple[float, str, tuple[str, ...]]] = []
        self.working = False

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run a batch; returns each run's value of the objective, or why it has none."""
        self.working = True
        runs = [compose_all([*self.fixed, *varied], False)[0] for varied in job_overrides]
        outcomes = self.carry_out(runs)
        self.outcomes += outcomes
        returns = []
        for varied, outcome in zip(job_overrides, outcomes, strict=True):
            done = JobReturn(overrides=varied)
            if outcome.exit_code == StoppedError.exit_code:
                raise StoppedError(outcome.error or "stopped")
            try:
                if not outcome.came_to_end:
                    raise UserError(f"run {outcome.name} has no result: {outcome.error}")
                value = self._value(outcome)
                self.found.append((value, outcome.name, tuple(varied)))
                done.status, done.return_value = JobStatus.COMPLETED, value
            except TinyLMMError as error:
                done.status, done.return_value = JobStatus.FAILED, error
            returns.append(done)
        self.working = False
        return returns

    def _value(self, outcome: RunOutcome) -> float:
        rows = result_rows(collect_report(outcome.folder.parents[1], [outcome.name]))
        there = list(dict.fromkeys(f"{row['evaluation']}/{row['metric']}" for row in rows))
        chosen = [row for row in rows if self.evaluation in ("", row["evaluation"])]
        chosen = [row for row in chosen if self.metric in ("", row["metric"])]
        if not chosen:
            raise UserError(
                f"objective={self.evaluation}{'/' + self.metric if self.metric else ''}: run {outcome.name} has no such "
                f"figure. It has {', '.join(there) or 'none'}."
            )
        last = chosen[-1]["stage"]
        return float(next(row["value"] for row in chosen if row["stage"] == last))

    def best(self, direction: Any) -> tuple[float, str, tuple[str, ...]] | None:
        """The best run so far."""
        lowest = "minimize" in str(direction).lower()
        return min(self.found, key=lambda one: one[0] if lowest else -one[0], default=None)
