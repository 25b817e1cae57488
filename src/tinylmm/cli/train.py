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
    from tinylmm.launch.runner import RunOutcome
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
    runs = compose_all(overrides, multirun)  # every fault of every run, before the first one starts
    from tinylmm.cli.terminal import terminal

    console = terminal()
    if len(runs) > 1:
        return _finish(_sweep(overrides, [words for words, _ in runs], console), console)
    plan = _plan(*runs[0])
    from tinylmm.launch.runner import execute

    return _finish([execute(plan, console)], console)


def _plan(overrides: Sequence[str], spec: RunSpec) -> RunPlan:
    """Plan one run; what is missing stops it before anything heavy is imported."""
    from tinylmm.config.compose import run_name
    from tinylmm.planning.planner import plan_run, require_files

    plan = plan_run(spec, run_name(spec), overrides)
    require_files(plan)
    return plan


def _sweep(overrides: list[str], runs: list[list[str]], console: Console) -> list[RunOutcome]:
    """Hand a multirun to Hydra's launcher (one job after another); a failed run does not keep the others from running."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig
    from rich.text import Text

    from tinylmm.config.compose import compose_config, rewrite_words
    from tinylmm.config.experiments import search_path
    from tinylmm.errors import EXIT_STOPPED, TinyLMMError
    from tinylmm.launch.runner import execute, failed_before_start

    outcomes: list[RunOutcome] = []
    common = set.intersection(*(set(words) for words in runs))

    def job(cfg: DictConfig) -> None:
        words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        varied = " ".join(word for word in words if word not in common)
        console.rule(Text(f"run {len(outcomes) + 1} of {len(runs)}: {varied}"), align="left")
        try:
            outcome = execute(_plan(words, compose_config(cfg, words)), console)
        except TinyLMMError as error:
            outcome = failed_before_start(words, error)
        outcomes.append(outcome)
        if outcome.error is not None:
            console.print(outcome.error, style="red", highlight=False)
        if outcome.exit_code == EXIT_STOPPED:  # SystemExit passes through Hydra's launcher: the sweep ends here
            raise SystemExit(EXIT_STOPPED)

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], "--multirun", *rewrite_words(overrides), search_path()]
    try:
        hydra.main(config_path="pkg://tinylmm.conf", config_name="train", version_base="1.3")(job)()
    except SystemExit as stop:
        if stop.code != EXIT_STOPPED:
            raise
    return outcomes


def _finish(outcomes: list[RunOutcome], console: Console) -> int:
    """Write the report of the runs that came to their end, print its table, and return the worst exit code."""
    from tinylmm.errors import printable, worst_exit_code
    from tinylmm.reports.collect import collect_report
    from tinylmm.reports.tables import render_scores
    from tinylmm.reports.write import write_files

    finished = [outcome for outcome in outcomes if outcome.came_to_end]
    if finished:
        report = collect_report(finished[0].folder.parents[1], [outcome.name for outcome in finished])
        paths = write_files(report)
        if any(run.evaluations for run in report.runs):
            console.print(render_scores(report))
        console.print(f"report   {paths.html}", highlight=False, soft_wrap=True)
    for outcome in outcomes:
        if outcome.error is not None:
            sys.stderr.write(printable(f"run {outcome.name}: {outcome.error}\n"))
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
