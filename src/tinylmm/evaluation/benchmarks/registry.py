"""Benchmarks by name: ours are the modules of this folder that define one, a user's own is named by its class's dotted path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tinylmm.config.spec import EvalSpec
from tinylmm.config.targets import resolve_target
from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.scoring import pick_variant
from tinylmm.evaluation.judge import checked_address

_DEFINITION = re.compile(r"^class \w+\(Benchmark\):", re.MULTILINE)


@cache
def benchmark_names() -> tuple[str, ...]:
    """Names of the shipped benchmarks, in alphabetical order. Reads the modules' text; imports none of them."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(path.stem for path in modules if _DEFINITION.search(path.read_text(encoding="utf-8")))


def get_benchmark(name: str, trust: Sequence[str] = (), **options: Any) -> Benchmark:
    """Return a benchmark with options of its class (`split`, TextVQA's `ocr`); only its own module is imported.

    Args:
        name: a shipped benchmark's, or the dotted path of a class in a trusted package.
        trust: packages that the user allows.
        options: keyword arguments of the class.

    Raises:
        ConfigError: there is none (the message lists all and suggests the closest), the path is not allowed, or the class
            has no such option, or not with this value.
    """
    made = _own(name, trust) if "." in name else _shipped(name)
    try:
        return made(**options)
    except TypeError as error:
        what = f"do not fit benchmark {name}: {str(error).partition(' ')[2]}."
        raise ConfigError([Fault("options", what)]) from error


def check_evaluation(key: str, spec: EvalSpec, trust: Sequence[str]) -> None:
    """Refuse, before anything starts, an evaluation that would fail after training: when it is asked, or scored.

    Raises:
        ConfigError: the benchmark, its options or its variant is unknown, its judge's address is none or it needs no judge,
            or it cannot be asked from a source of a data set; each fault names its key.
    """
    try:
        benchmark = get_benchmark(spec.benchmark, trust, **spec.options)
        pick_variant(benchmark, spec.variant)
        if spec.judge.base_url is not None and spec.judge.model is not None:
            checked_address(spec.judge.base_url, spec.judge.model)
        if spec.judge.model is not None or spec.judge.runs > 1:
            check_use_of_judge(benchmark, spec.judge.runs)
    except ConfigError as error:
        keys = {"_target_": "benchmark", "split": "options.split"}
        faults = [Fault(f"eval.{key}.{keys.get(f.where, f.where)}", f.what, f.fix) for f in error.faults]
        raise ConfigError(faults) from error
    if spec.source is not None and type(benchmark).load_source is Benchmark.load_source:
        what = f"is {benchmark.name}, which reads its own files, not a source of a data set."
        raise ConfigError([Fault(f"eval.{key}.benchmark", what, "Set `root`, and neither `data` nor `source`.")])


def check_use_of_judge(benchmark: Benchmark, runs: int) -> None:
    """Refuse a judge of a benchmark that asks none, and more runs of one that lets each answer be judged once.

    Raises:
        ConfigError: it is scored by rules alone, or averages no runs.
    """
    if not (benchmark.judged or benchmark.may_be_judged):
        what = f"is set, but {benchmark.name} is scored by rules alone: nobody would be asked."
        raise ConfigError([Fault("judge", what, "Leave it out.")])
    if runs > 1 and not benchmark.averages_runs:
        what = f"is {runs}, but {benchmark.name} lets each answer be judged once."
        raise ConfigError([Fault("judge.runs", what, "Leave it out.")])


def _shipped(name: str) -> type[Benchmark]:
    if name not in benchmark_names():
        what = f"'{name}' is unknown. {suggestion(name.lower(), benchmark_names())}".rstrip()
        own = "your own by the dotted path of its class"
        raise ConfigError([Fault("benchmark", what, f"Available: {', '.join(benchmark_names())}; {own}.")])
    module = import_module(f"{__package__}.{name}")
    (found,) = (cls for cls in vars(module).values() if _is_defined_in(module.__name__, cls))
    return found


def _is_defined_in(module: str, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Benchmark) and value.__module__ == module


def _own(dotted: str, trust: Sequence[str]) -> type[Benchmark]:
    found: type[Benchmark] = resolve_target(dotted, trust, Benchmark, role="benchmark")
    return found
