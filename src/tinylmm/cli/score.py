"""`tinylmm score`: scores of an answer file, without a model. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from tinylmm.cli.terminal import echo, terminal
from tinylmm.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    from tinylmm.evaluation.benchmarks.base import Benchmark
    from tinylmm.evaluation.benchmarks.records import Format, Item, Scores
    from tinylmm.evaluation.judge import Judge

LAYOUTS = ("auto", "llava", "hf")
_PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")


def score(
    benchmark: Annotated[
        str, typer.Argument(help="vqav2, gqa, pope, mme, mmmu, ..., or your own class's dotted path.")
    ],
    answers: Annotated[Path, typer.Option(help="LLaVA-style answers: one {question_id, prompt, text} a line.")],
    root: Annotated[Path, typer.Option(help="The benchmark's folder, or the one around it (playground/data/eval).")],
    variant: Annotated[str | None, typer.Option(help="Protocol; default: the one that papers report.")] = None,
    layout: Annotated[str, typer.Option(help="Files under ROOT: llava (eval.zip), hf (parquet), or auto.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Where a benchmark has several, e.g. val or test-dev.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write metrics and per-item scores there.")] = None,
    submission: Annotated[Path | None, typer.Option(help="Also write the file that the server takes.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; its key: TINYLMM_JUDGE_API_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's model name.")] = None,
    judge_runs: Annotated[int, typer.Option(min=1, help="How often each answer is judged (MM-Vet averages them).")] = 1,
    trust: Annotated[list[str] | None, typer.Option(help="Package that your own benchmark's class is in.")] = None,
) -> None:
    """Score an answer file by a benchmark's published rules."""
    # imported here, as reading benchmarks is no concern of other commands
    from tinylmm.evaluation.benchmarks.files import read_answer_file
    from tinylmm.evaluation.benchmarks.registry import check_use_of_judge, get_benchmark
    from tinylmm.evaluation.benchmarks.scoring import pick_variant

    chosen = get_benchmark(benchmark, trust or (), **({"split": split} if split else {}))
    variant = pick_variant(chosen, variant)
    judge = _judge(judge_url, judge_model, judge_runs)
    if judge is not None or judge_runs > 1:
        check_use_of_judge(chosen, judge_runs)
    rows = read_answer_file(answers)
    items = _load(chosen, root, layout)
    paired = chosen.pair(items, rows)
    scores = chosen.score(items, paired, variant, judge)
    repeated = len(rows) - len(paired)
    if repeated > 0:
        scores.counts["duplicate"] = repeated
        echo(f"{answers}: {repeated} answers repeat another's question; the last of each counts.", err=True)
    if as_json is not None:
        _write(as_json, json.dumps(scores.as_json(items), indent=1, ensure_ascii=False))
    if submission is not None:
        submission.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_submission(items, paired, submission)
    _print(scores, chosen)


def _load(benchmark: Benchmark, root: Path, layout: str) -> list[Item]:
    """Read by the named layout; `auto` takes `llava` where it can be read, else `hf` where that can, and says so then."""
    if layout not in LAYOUTS:
        raise ConfigError([Fault("layout", f"'{layout}' is unknown.", f"Allowed: {', '.join(LAYOUTS)}.")])
    if layout != "auto":
        return _checked(benchmark.load(root, cast("Format", layout)), root)
    try:
        return _checked(benchmark.load(root, "llava"), root)
    except DataError as error:
        if not any(next(root.glob(pattern), None) for pattern in _PARQUET):
            raise
        try:
            items = _checked(benchmark.load(root, "hf"), root)
        except DataError:
            raise error from None  # neither can be read: say what the default layout lacks
    echo(f"read by layout hf ({root} holds parquet files, and cannot be read by layout llava)", err=True)
    return items


def _checked(items: list[Item], root: Path) -> list[Item]:
    if not items:
        raise DataError(f"{root}: the question file has no question. Fetch it again.")
    return items


def _judge(url: str | None, model: str | None, runs: int) -> Judge | None:
    if url is None and model is None:
        return None
    if url is None or model is None:
        missing = "--judge-model" if model is None else "--judge-url"
        raise ConfigError([Fault(missing, "missing: a judge needs both its address and its model.")])
    from tinylmm.evaluation.judge import Judge, default_cache

    return Judge(url, model, cache=default_cache(), runs=runs)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}). Name another file.") from error


def _print(scores: Scores, benchmark: Benchmark) -> None:
    table = Table(title=f"{scores.benchmark}, variant {scores.variant}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in scores.aggregate.items():
        table.add_row(f"{name} (headline)" if name == benchmark.headline else name, _shown(value))
    console = terminal()
    if scores.aggregate:
        console.print(table)
    else:
        console.print(f"{scores.benchmark}: no metric, as none of the items could be scored here.")
    console.print(", ".join(f"{name} {count}" for name, count in scores.counts.items()), highlight=False)


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
