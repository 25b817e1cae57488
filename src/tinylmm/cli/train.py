"""`tinylmm-train`: the Hydra app. Compose, check, run what the store lacks, print the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinylmm.cli.errors import guarded
from tinylmm.cli.help import train_help

if TYPE_CHECKING:
    from rich.console import Console

    from tinylmm.config.spec import RunSpec
    from tinylmm.launch.ledger import RunOutcome
    from tinylmm.planning.planner import RunPlan

HELP = {"-h", "--help"}
MULTIRUN = {"-m", "--multirun"}
QUIET_LOGGERS = ("transformers", "deepspeed", "datasets", "accelerate", "torch", "httpx", "filelock")


def main() -> None:
    """Entry point of `tinylmm-train`."""
    sys.exit(guarded(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run the command with these words; returns the exit code."""
    if HELP & set(arguments):
        sys.stdout.write(train_help())
        return 0
    if any(word.startswith("--") and word not in MULTIRUN for word in arguments):
        return _run_hydra_flags(arguments)  # --cfg job, --info, --config-dir ...
    from tinylmm.config.compose import compose_all

    multirun = bool(MULTIRUN & set(arguments))
    overrides = [word for word in arguments if word not in MULTIRUN]
    if multirun and any(word.startswith("hydra/sweeper=") for word in overrides):
        return _search(overrides)
    runs = compose_all(overrides, multirun)  # every fault of every run, before the first one starts
    plans, refused = _plans(runs)
    from tinylmm.cli.terminal import terminal
    from tinylmm.launch.runner import execute

    console = terminal()
    if plans and _on_slurm(plans):
        return report([*refused, *_submit(plans)], console)
    return report([*refused, *(execute(plans, console) if plans else [])], console)


def _search(words: list[str]) -> int:
    """Let a sweeper of Hydra choose the runs."""
    from tinylmm.cli.search import search
    from tinylmm.cli.terminal import terminal
    from tinylmm.errors import UserError
    from tinylmm.launch.runner import execute

    console = terminal()

    def carry_out(runs: Sequence[tuple[list[str], RunSpec]]) -> list[RunOutcome]:
        plans, refused = _plans(runs)
        for outcome in refused:
            raise UserError(f"{outcome.name}: {outcome.error}")
        return _submit(plans) if _on_slurm(plans) else execute(plans, console)

    return report(search(words, carry_out, console), console)


def _on_slurm(plans: Sequence[RunPlan]) -> bool:
    """Whether the runs are jobs of SLURM: all of them or none."""
    if len({plan.run.launch.slurm is None for plan in plans}) > 1:
        from tinylmm.errors import UserError

        raise UserError("launch: some runs of the sweep are for SLURM and some are not. Give them in two commands.")
    return plans[0].run.launch.slurm is not None


def _submit(plans: Sequence[RunPlan]) -> list[RunOutcome]:
    from tinylmm.cli.terminal import terminal
    from tinylmm.launch.slurm import submit

    return submit(plans, terminal, report)


def _plans(runs: Sequence[tuple[list[str], RunSpec]]) -> tuple[list[RunPlan], list[RunOutcome]]:
    """Plan the runs; what is missing stops one of them before anything heavy is imported, and of a sweep no other."""
    from tinylmm.errors import TinyLMMError
    from tinylmm.planning.planner import plan_runs, require_files

    plans, refused = [], []
    for words, plan in plan_runs(runs):
        try:
            if isinstance(plan, TinyLMMError):
                raise plan
            require_files(plan)
            plans.append(plan)
        except TinyLMMError as error:
            if len(runs) == 1:
                raise
            from tinylmm.launch.ledger import failed_before_start

            refused.append(failed_before_start(words, error))
    return plans, refused


def report(outcomes: list[RunOutcome], console: Console) -> int:
    """Write the report of the runs that came to their end, print its table, and return the worst exit code."""
    from tinylmm.errors import printable, worst_exit_code
    from tinylmm.reports.collect import collect_report
    from tinylmm.reports.effects import findings_of
    from tinylmm.reports.tables import render_scores
    from tinylmm.reports.write import write_files

    finished = [outcome for outcome in outcomes if outcome.came_to_end]
    if finished:
        found = collect_report(finished[0].folder.parents[1], [outcome.name for outcome in finished])
        findings = findings_of(found)
        paths = write_files(found, findings=findings)
        if any(run.evaluations for run in found.runs):
            console.print(render_scores(found, findings))
        console.print(f"report   {paths.html}", highlight=False, soft_wrap=True)
    said: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            said.setdefault(outcome.error, []).append(outcome.name)
    for error, names in said.items():  # what many runs need is told once
        sys.stderr.write(printable(f"run {', '.join(names)}: {error}\n"))
    return worst_exit_code(outcome.exit_code for outcome in outcomes)


def _run_hydra_flags(arguments: Sequence[str]) -> int:
    import hydra
    from omegaconf import DictConfig

    from tinylmm.config.compose import rewrite_words
    from tinylmm.config.experiments import search_path

    flags = [word for word in arguments if word.startswith("-")]
    words = [word for word in arguments if not word.startswith("-")]
    # A flag's own argument (`--cfg job`) is no override: what follows a flag and has no `=` stays beside it.
    values = [word for word in words if "=" not in word and not word.startswith("~")]
    overrides = [word for word in words if word not in values]

    def refuse(cfg: DictConfig) -> None:
        from tinylmm.errors import UserError

        raise UserError(f"tinylmm-train takes no {', '.join(flags)} together with a run; see tinylmm-train --help")

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [
        sys.argv[0],
        *(w for w in arguments if w in flags or w in values),
        *rewrite_words(overrides),
        search_path(),
    ]
    hydra.main(config_path="pkg://tinylmm.conf", config_name="train", version_base="1.3")(refuse)()
    return 0


if __name__ == "__main__":
    main()
