"""Benchmarks by name. A benchmark's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation.benchmarks.base import Benchmark

BENCHMARKS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "sqa": "SQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmmu": "MMMU",
    "mmvet": "MMVet",
    "llava_bench": "LLaVABench",
    "mmbench": "MMBench",
    "seed": "SEED",
    "vizwiz": "VizWiz",
    "qbench": "QBench",
    "mvbench": "MVBench",
    "videomme": "VideoMME",
}
"""Name -> class, in the module of the same name beside this one."""


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark called `name`.

    Raises:
        ConfigError: there is none; the message lists all and suggests the closest.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            [
                Fault(
                    "benchmark",
                    f"'{name}' is unknown. {suggestion(name.lower(), BENCHMARKS)}".rstrip(),
                    f"Available: {', '.join(BENCHMARKS)}.",
                )
            ]
        )
    module = import_module(f"tinylmm.evaluation.benchmarks.{name}")
    benchmark = getattr(module, BENCHMARKS[name])()
    assert isinstance(benchmark, Benchmark)
    return benchmark
